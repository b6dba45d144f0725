"""What can be wrong before a run, looked at before a weight is loaded, all of it at once.

`checks` has the table of checks and asks them on the ranks that they are for; each of the modules
that it names looks at one thing and returns `finding`s; `report` prints them. Only `train.py` uses
this room.
"""
