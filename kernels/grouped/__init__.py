"""Experts computed only for the rows that selected them: pools whose sorted work is much smaller than the dense work.

The dense kernels multiply every token by all N r ranks; here a token is multiplied by the K r ranks of its K experts.
The price is memory traffic: rows are gathered and every pair of a row and an expert has an output of its own before
they are added. :func:`kernels.grouped.crossover.crossover` says from how many ranks on that is less time.
"""
