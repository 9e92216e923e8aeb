"""Helpers without torch: files, numbers for people, facts about the machine."""
