"""The instrument: what the Assistant Axis is made from, and the bundle of numbers that carries it.

`catalogue` holds the roles, questions and style requests that an axis is made from, `bundle` the axis with its
provenance, `published` turns the paper's own files into the same terms. numpy only: nothing here knows a model.
"""
