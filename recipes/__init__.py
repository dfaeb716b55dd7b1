"""Recipes that ship with dwakd, as package data."""
