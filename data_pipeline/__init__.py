"""Decides who reads what: packs pictures into tars, plans every batch, and streams it."""
