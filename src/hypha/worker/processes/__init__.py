"""An executor's process: started or forked, kept, isolated, ended with all that it started."""
