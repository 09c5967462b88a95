"""What a reader gets to see: tables, charts, one HTML page, the model card;
read from records, nothing measured here.
"""
