"""What is checked before anybody is leased: does the job's model go with its dataset?"""
