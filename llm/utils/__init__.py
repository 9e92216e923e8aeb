"""Files, numbers for people, facts about the machine."""
