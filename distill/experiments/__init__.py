"""Studies that use the framework as its users do:

each is one command that ends in a table, a picture and results.json.
"""
