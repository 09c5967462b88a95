"""What a model says where it should not, and how compression changes that: refusals, and eight dimensions of trust.

None of the prompts that are asked lie here. They come from files that the user names, or are built from records that
we made up.
"""
