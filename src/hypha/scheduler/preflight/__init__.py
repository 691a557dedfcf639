"""What is checked before anybody is leased: does the job's model go with its dataset?

- Checks before leasing: certain failures are errors (exit code 2, nothing leased); what is likely, or only of
  this machine, is advice; what is not known is not judged. A manifest's ``ranges`` (the smallest and largest
  number of each column) are outside its hash: replicas with and without stay interchangeable.
"""
