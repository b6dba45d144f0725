"""What Composer lacks and this job needs, and the Trainer that is built of both."""
