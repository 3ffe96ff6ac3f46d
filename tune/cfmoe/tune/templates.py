"""The prompts of the tasks. An answer follows its prompt after one space; braces name fields that tasks.py fills in."""

from __future__ import annotations

INSTRUCTION = "Instruction: {instruction}\nResponse:"
INSTRUCTION_WITH_INPUT = "Instruction: {instruction}\nInput: {input}\nResponse:"
WORD_PROBLEM = "Solve the problem step by step and end with the result.\nProblem: {question}\nSolution:"
CHOICE = "Choose the right option.\nQuestion: {question}\n{options}\nAnswer:"
CHOICE_WITH_WORKING = "Work out the right option.\nProblem: {question}\n{options}\nSolution:"
SUBJECT_CHOICE = "Choose the right option. Subject: {subject}.\nQuestion: {question}\n{options}\nAnswer:"
GOAL_CHOICE = "Choose the better way to reach the goal.\nGoal: {question}\n{options}\nAnswer:"
SITUATION_CHOICE = "Choose the right option.\nSituation: {context}\nQuestion: {question}\n{options}\nAnswer:"
YES_OR_NO = "Answer with yes or no.\nQuestion: {question}\nAnswer:"
YES_OR_NO_WITH_PASSAGE = "Answer with yes or no.\nPassage: {passage}\nQuestion: {question}\nAnswer:"
SUMMARY = "Summarise the conversation.\n{dialogue}\nSummary:"
ARTICLE = "Write an encyclopedia article.\nTitle: {entry}\nArticle:"
