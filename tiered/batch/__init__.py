"""Many requests from a file, answered into a file, in this process or on Ray's workers."""
