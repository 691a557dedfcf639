"""What is checked before anybody is leased: does the job's model go with its dataset? A manifest's ``ranges``
(the smallest and largest number of each column) are outside its hash: replicas with and without stay
interchangeable.
"""
