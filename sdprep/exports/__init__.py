"""Layouts that other trainers read: one module each."""
