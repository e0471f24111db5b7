"""Figures of one experiment. Only this folder imports Matplotlib."""
