"""Explaining a failure after the fact: from the register dump that a VMM left in a log."""
