"""Prompts to preference pairs: sample from the policy, have the teacher revise, judge or answer, and filter."""
