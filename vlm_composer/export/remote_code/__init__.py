"""What an exported folder loads with: transformers' classes of this model.

`code_files` copies these modules into the folder, with the plain modules that they import, which
are those that were trained. They import torch, transformers, numpy and PIL, and of this project
only modules that keep to the same.
"""
