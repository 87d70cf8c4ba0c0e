"""Does a revision speak of being one? Such words ("In this corrected solution, …") teach a policy to talk of corrections.

In: the revision, and what its reader knows (the task and the rejected answer). Out: the words that give it away, or
None. A phrase counts where it points at the answer itself ("here is the revised version", "your original answer"), not
where a thing of the world is improved ("an improved version of the iPhone"); and not where the task asks for editing, or
where the task or the rejected answer talk so themselves. English only.
"""

from __future__ import annotations

import re


def find_leak(text: str, task: str, rejected: str) -> str | None:
    """The first words by which `text` betrays that it revises an earlier answer."""
    text, known = _plain(text), _plain(f"{task}\n{rejected}")
    for name in _IDENTIFIERS.finditer(text):
        if name[0].lower() not in known.lower():
            return name[0]
    if any(pattern.search(known) for pattern in _SPEECH):
        return None
    matches = [match for pattern in _SPEECH for match in pattern.finditer(text) if not _excused(match, task)]
    first = min(matches, key=lambda match: match.start(), default=None)
    return " ".join(first[0].split()) if first else None


def _plain(text: str) -> str:
    """Without typographic quotes and without marks of emphasis within the words."""
    return re.sub(r"\*\*|__|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text.replace("’", "'"))


def _excused(match: re.Match[str], task: str) -> bool:
    """Whether the task asks for what the words report: to edit a text or some code."""
    if match.re in _OF_THE_ANSWER:
        return False
    return bool(_ASKS_TO_EDIT.search(task) or (_ASKS_TO_CHANGE.search(task) and _CHANGED.search(match[0])))


def _any(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


def _pattern(*parts: str) -> re.Pattern[str]:
    return re.compile("".join(parts), re.IGNORECASE | re.MULTILINE)


# --------------------------------------------------------------------------------------------------------------- words

_REVISED = _any(
    "corrected revised improved enhanced updated refined rewritten reworked edited amended polished fixed modified adjusted"
    " reworded rephrased restructured reformulated clarified redone rectified"
)
_EDITED_VERB = _any(
    "corrected revised improved enhanced updated refined rewritten rewrote reworked edited amended polished fixed modified"
    " adjusted reworded rephrased restructured reformulated clarified rectified streamlined"
)
_ANSWER = _any("answer solution response reply submission attempt")
_TEXT = _any(
    "version revision explanation code program snippet script function implementation text paragraph sentence passage essay"
    " draft wording example description summary statement list table dialogue conversation story poem letter email approach"
    " format breakdown guide outline analysis query formula calculation calculations steps proof content write-up recipe"
    " translation rewrite title titles question questions"
)
# "improved answer quality", "revised response times": the noun must end its phrase
_ENDS = (
    r"(?=\s*(?:$|[^\w\s'-]|(?:to|of|for|that|which|is|are|was|will|with|in|by|we|you|i|it|and|or|but|would|should|could|can"
    r"|may|might|now|has|have|had|here|below|above|as|based|from|using|while|without|after|where|this|the|also|more|so"
    r"|includes?|provides?|addresses|ensures?|offers?|maintains?|keeps?|aims?|uses?|follows?|makes?|adds?|gives?|removes?"
    r"|handles?|checks?|works?|does|clearly|correctly|accurately|properly|better|not|retains?|reflects?|takes?|presents?"
    r"|highlights?|focuses|incorporates?|clarifies|explains?|improves?|corrects?|fixes|preserves?|avoids?|considers?)\b))"
)
_GAP_WORD = r"(?!(?:of|in|to|for|the|is|are|was|were|by|on|at|from|that|which|his|her|their|its|our|your|a|an|with)\b)[\w'-]+"
_GAP = rf"(?:[ ,]+{_GAP_WORD}){{0,4}}?[ ,]+"
_LEAD = rf"(?:{_GAP_WORD}[ ,]+){{0,4}}?"
_HERE = (
    r"\b(?:here(?:'s| is| are|, then, is)|below (?:is|are|you'll find|you will find)|(?:the )?following (?:is|are)"
    r"|(?:i(?:'ve| have|'ll| will)?|let me|we(?:'ve| have)?) (?:\w+ )?(?:provided?|present|presented|offer|give|given|wrote"
    r"|written|prepared|created?|suggest)|this is)"
)
_A = r" (?:(?:a|an|the|your|my|our|one|some) )?"
_LINE = r"^[ \t]*(?:\#{1,6}[ \t]*|[->*•][ \t]*|\d+[.)][ \t]*|[\(\[`\"]+)*"

# ------------------------------------------------------------------------------------------------------------ patterns

_IDENTIFIERS = re.compile(r"\b(?:corrected_)?student_solution(?:_[12])?\b|\bteacher[_ ]reasoning\b", re.IGNORECASE)

# the answer is called an answer, and a revised one: no task asks for that
_OF_THE_ANSWER = (
    _pattern(r"\b(?:this|the|my|our|your|in|as an?|following) ", _LEAD, _REVISED, _GAP, _ANSWER, _ENDS),
    _pattern(_HERE, _A, _LEAD, _REVISED, _GAP, _ANSWER, _ENDS),
    _pattern(_LINE, r"(?:(?:the|my|a|an) )?", _REVISED, _GAP, r"(?:student(?:'s)? )?", _ANSWER, r"[ \t`\")\]]*(?::|$)"),
    _pattern(r"\bstudent(?:'s|s') (?:\w+ ){0,2}", _any("answer solution response submission attempt explanation"), r"\b"),
    _pattern(
        r"\b(?:the|your|my|our|an?|this|that|student's) (?:student's )?(?:original|previous|earlier|prior|initial)"
        r" (?:student(?:'s)? )?(?:answer|explanation|attempt)",
        _ENDS,
    ),
    _pattern(
        r"\b(?:the|your|my|our|student's) (?:student's )?(?:original|previous|earlier|prior)"
        r" (?:student(?:'s)? )?(?:response|reply|solution)",
        _ENDS,
    ),
    _pattern(r"\b(?:here(?:'s| is)|this is) an? (?:clearer|better|more (?:accurate|correct|engaging))", _GAP, _ANSWER, _ENDS),
    _pattern(r"\bclear(?:er)?,? (?:and )?more (?:correct|accurate),? and (?:more )?engaging\b"),
    _pattern(
        r"\b(?:the|this|my) ", _any("answer solution response"), r" (?:has|have) (?:now )?been (?:\w+ly )?", _REVISED, r"\b"
    ),
    _pattern(
        r"\b(?:i|we)(?:'ve| have)? (?:\w+ ){0,2}?", _EDITED_VERB, r" (?:upon |on )?(?:the|this|your|my|that) (?:\w+ ){0,2}?",
        _any("answer solution response"), _ENDS,
    ),
    _pattern(r"\b(?:revision|correction|improvement|rewrite) (?:of|to|on|over) (?:the|your|my) (?:\w+ )?", _ANSWER, _ENDS),
)

# a text or some code is called a revised one, and shown: what a task of editing asks for
_OF_A_TEXT = (
    _pattern(_HERE, _A, _LEAD, _REVISED, _GAP, _TEXT, r"(?! of (?!the\b|your\b|this\b|my\b|that\b))", _ENDS),
    _pattern(
        r"\b(?:this|my) ", _LEAD, _any("corrected revised rewritten reworked edited amended reworded rephrased"), _GAP, _TEXT,
        r"(?! of (?!the\b|your\b|this\b|my\b|that\b))", _ENDS,
    ),
    _pattern(
        r"\b(?:this|my) ", _LEAD, _any("improved enhanced updated refined polished fixed modified clarified"), _GAP,
        _any("version explanation code program script function implementation wording text"),
        r"(?! of (?!the\b|your\b|this\b|my\b|that\b))", _ENDS,
    ),
    _pattern(
        r"\b(?:in )?the ", _LEAD, _any("corrected revised rewritten reworked improved"), _GAP,
        _any("version explanation code program script function implementation wording"),
        r"(?= (?:above|below|is as follows|should|would|will|now|ensures|includes|provides|addresses|maintains|looks|uses)\b|[:,])",
    ),
    _pattern(_LINE, r"(?:(?:the|my) )?", _REVISED, _GAP, _TEXT, r"[ \t`\")\]]*(?::|$)"),
    _pattern(
        r"\b(?:i|we)(?:'ve| have) (?:\w+ ){0,2}?", _EDITED_VERB, r" (?:the|this|your|some|several|a few|all|these|those|any) ",
        r"(?:\w+ ){0,3}?",
        _any("explanation code program function script errors? mistakes? typos? wording grammar formatting calculations?"
             " inaccurac(?:y|ies) statement text sentence paragraph example formula structure issues? inconsistenc(?:y|ies)"),
        _ENDS,
    ),
    _pattern(
        r"\b(?:the|this) (?:explanation|code|program|function|script|calculation|wording|formula|statement) (?:above |below )?"
        r"(?:has|have) (?:now )?been (?:\w+ly )?", _REVISED, r"\b",
    ),
    _pattern(r"\b(?:in|with|through) (?:this|these|the above|the following) (?:corrections?|revisions?|edits)", _ENDS),
    _pattern(r"\b(?:this|these) (?:corrections?|revisions?|rewrites?) (?:\w+ly )?(?:ensures?|makes?|provides?|addresses?|keeps?"
             r"|maintains?|improves?|clarif(?:y|ies)|fix(?:es)?|aims?|should|will|offers?|gives?|adds?|includes?)\b"),
    _pattern(
        _LINE, r"(?:key |main |summary of |explanation of |list of |the )*(?:changes|corrections|revisions|improvements|edits"
        r"|modifications) (?:i |that were |i've )?made\b",
    ),
    _pattern(_LINE, r"(?:key |main |summary of |explanation of |list of |the )+(?:corrections|revisions|edits)[ \t`\")\]]*(?::|$)"),
    _pattern(_LINE, r"(?:corrections|revisions|revision)[ \t`\")\]]*:"),
    _pattern(r"\b", _any("corrected revised rewritten edited reworded rephrased restructured"), r" (?:here |slightly )?for"
             r" (?:\w+ )?(?:clarity|accuracy|correctness|readability|conciseness|brevity|grammar|engagement)\b"),
    _pattern(r"[\(\[](?:corrected|revised|improved|edited)[\)\]]"),
    _pattern(
        r"(?:\#|//|/\*|<!--) ?(?:corrected|revised|fixed)(?::| (?:the|from|to|line|condition|logic|import|function|code|syntax"
        r"|indentation|typo|spelling|variable|version)\b)",
    ),
)  # fmt: skip
_SPEECH = (*_OF_THE_ANSWER, *_OF_A_TEXT)

_WRITTEN = _any(
    "text texts sentences? paragraphs? essay code email e-mail letter writing answer response story poem article description"
    " statement resume cv summary draft wording function query prompt script program document content title headline bio"
    " paper speech phrase passage blog post following below given message grammar spelling punctuation errors? mistakes?"
    " typos? bugs? translation abstract review report dialogue lines? recipe snippet"
)
_ASKS_TO_EDIT = _pattern(
    r"\b(?:rewrit(?:e|ing)|re-writ(?:e|ing)|rephras(?:e|ing)|paraphras(?:e|ing)|reword(?:ing)?|proofread(?:ing)?|proof-read"
    r"|edit(?:ing)?|revis(?:e|ing|ion)|debug(?:ging)?|refactor(?:ing)?|copyedit(?:ing)?)\b"
    r"|\b(?:improv(?:e|ing)|enhanc(?:e|ing)|polish(?:ing)?|refin(?:e|ing)|optimi[sz](?:e|ing)|fix(?:ing)?|amend(?:ing)?"
    r"|correcting|correct(?= (?:the|this|my|any|all|these|those|it|and|following|grammar|spelling|punctuation|errors?"
    r"|mistakes?|typos?)\b)|restructur(?:e|ing)|rework(?:ing)?|clean(?:ing)? up|review(?:ing)?|feedback)"
    rf"(?:\W+[\w'-]+){{0,8}}?\W+{_WRITTEN}\b"
    r"|\b(?:errors?|mistakes?|bugs?|typos?) in (?:the|this|my|these|following)\b|\bwrong with (?:this|my|the)\b",
)
_ASKS_TO_CHANGE = _pattern(
    r"\b(?:modify|change|update|convert|adapt|transform|adjust|extend|add|turn|make|shorten|simplify|expand|translate)\b"
)
_CHANGED = _pattern(r"\b", _any("updated modified edited rewritten revised adjusted reworked refined"), r"\b")
