"""One module a command of the command line; each is also a function to call from Python."""
