"""Writing a shrunk model so that others can open it. Importing this package stays cheap: its modules are imported by
name.
"""
