"""One file an engine: is it there, how is it asked, and does it compute what the live model computes?"""
