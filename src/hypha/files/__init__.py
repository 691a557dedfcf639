"""Files and directories: which appear whole, on what disks, below whose directories, at which URLs."""
