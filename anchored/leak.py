"""Does a revision speak of being one? Such words ("In this corrected solution") teach a policy to talk of corrections.

In: the revision, and what its reader knows (the task and the rejected answer). Out: the words that give it away, or
None. A phrase counts where it points at the answer itself ("here is the revised version", "your original answer"), not
where a thing of the world is improved ("an improved version of the iPhone"); and not where the task asks for editing,
or where the task or the rejected answer talk so themselves. English at length; in nine more languages what calls an
answer a revised one, or the student's, unless the task speaks of answers or of students.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


def find_leak(text: str, task: str, rejected: str) -> str | None:
    """The first words by which `text` betrays that it revises an earlier answer."""
    text = _plain(text)
    names, found = _identifiers(text), list(_matches(text))
    if not names and not found:
        return None
    known = _plain(f"{task}\n{rejected}").lower()
    for name in names:
        if name.lower() not in known:
            return name
    if any(True for _ in _matches(known)):
        return None
    matches = [match for phrase, match in found if not _excused(phrase, match, task, known)]
    first = min(matches, key=lambda match: match.start(), default=None)
    return first[0].strip() if first else None


@dataclass(frozen=True, slots=True)
class _Phrase:
    """Words that speak of a revision."""

    pattern: re.Pattern[str]
    needs: tuple[tuple[str, ...], ...]
    """Of each of these, a text in which the pattern matches has at least one: to look for them takes far less time."""


def _matches(text: str) -> Iterator[tuple[_Phrase, re.Match[str]]]:
    there = _Words(text)
    for phrase in _PHRASES:
        if all(any(map(there.__getitem__, words)) for words in phrase.needs):
            for match in phrase.pattern.finditer(text):
                yield phrase, match


class _Words(dict[str, bool]):
    """Which words stand in a text; each is looked for when it is first asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text.casefold()

    def __missing__(self, word: str) -> bool:
        self[word] = found = word in self._text
        return found


def _identifiers(text: str) -> list[str]:
    there = _Words(text)
    return [name[0] for name in _IDENTIFIER.finditer(text)] if there["student"] or there["teacher"] else []


def _plain(text: str) -> str:
    """On one line per paragraph, without typographic quotes, without marks of emphasis."""
    text = _EMPHASIS.sub("", text.replace("’", "'"))
    text = _LINE_GOES_ON.sub(" ", text)
    return _GAPS.sub(" ", text) if "  " in text or "\t" in text else text


# both begin with what they look for, which is found far faster than what stands before it
_EMPHASIS = re.compile(r"\*\*|__|[*_](?:(?<!\w[*_])(?=\w)|(?<=\w[*_])(?!\w))")
_LINE_GOES_ON = re.compile(r"\n(?<=[\w,]\n)(?=[a-z])")
_GAPS = re.compile(r"[ \t]{2,}|\t")


def _excused(phrase: _Phrase, match: re.Match[str], task: str, known: str) -> bool:
    """Whether the words are at home in this task: it has students or solutions in it, or asks to edit a text."""
    if phrase in _OF_AN_ANSWER or phrase in _ELSEWHERE:
        named = match.groupdict().get("named")
        # "the previous answer" may also be one of an earlier turn
        return named is not None and (named.lower() in known or (" " in named and "assistant: " in known))
    return bool(_ASKS_TO_EDIT.search(task) or (_ASKS_TO_CHANGE.search(task) and _CHANGED.search(match[0])))


def _any(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


_WORDS = {
    "revised": (
        "corrected revised improved enhanced updated refined rewritten reworked edited amended polished fixed modified"
        " adjusted reworded rephrased restructured reformulated clarified redone rectified revamped tweaked overhauled"
        " upgraded"
    ),
    "reworded": "corrected revised rewritten reworked edited amended reworded rephrased restructured",
    "polished": "improved enhanced updated refined polished fixed modified clarified",
    "answer": "answer solution response reply submission attempt",
    "text": (
        "version revision explanation code program snippet script function implementation text paragraph sentence"
        " passage essay draft wording example description summary statement list table dialogue conversation story"
        " poem letter email approach format breakdown guide outline analysis query formula calculations? steps proof"
        " content write-up recipe translation rewrite titles? questions?"
    ),
    "code": "explanation code program script function implementation wording formula statement calculation",
    "earlier": "original previous earlier prior initial",
}
_REVISED, _ANSWER, _TEXT = (_any(_WORDS[name]) for name in ("revised", "answer", "text"))
# a noun that goes on is another thing: improved response times, a revised answer key
_COMPOUND = _any(
    "times rates keys sheets choices options reviews bases standards systems plans teams units levels classes forms"
    " types"
    " curves spaces sets chains officers services"
)
_AFTER_A_NOUN = _any(
    "to of for that which is are was will with in by we you i it and or but would should could can may might now has"
    " have had here below above as based from using while without after where this the also more so not said clearly"
    " correctly accurately properly better"
)
_GAP_WORD = (
    r"(?!(?:of|in|to|for|the|is|are|was|were|by|on|at|from|that|which|his|her|their|its|our|your|a|an"
    r"|with)\b)[\w'+#/-]+"
)
_PIECES = {
    **{name: _any(words) for name, words in _WORDS.items()},
    "edited": rf"(?:{_REVISED}|rewrote|redid|streamlined)",
    "mistakes": _any(
        "explanation code program function script errors? mistakes? typos? wording grammar formatting calculations?"
        " inaccurac(?:y|ies) statements? texts? sentences? paragraphs? examples? formula structure issues?"
        " inconsistenc(?:y|ies)"
    ),
    "words": rf"(?:{_GAP_WORD}[ ,]+){{0,4}}?",
    "gap": rf"(?:[ ,]+{_GAP_WORD}){{0,4}}?[ ,]+",
    "end": rf"(?=\s*(?:$|[^\w\s'-]|(?!{_COMPOUND}\b)\w+(?:s|ed|ly)\b|{_AFTER_A_NOUN}\b))",
    # a revised version of the constitution is no text at hand
    "of_writing": rf"(?! of (?!(?:the|your|this|my|that) (?:\w+ ){{0,2}}(?:{_ANSWER}|{_TEXT}|original)\b))",
    "here": (
        r"\b(?:here(?:'s| is| are)|below (?:is|are|you(?:'ll| will) find)|(?:the )?following (?:is|are)|this is"
        r"|(?:i|we|let me)(?:'ve| have|'ll| will)? (?:\w+ )?(?:provided?|present|presented|offer|give|given|wrote"
        r"|written"
        r"|prepared|created?|suggest)) (?:(?:an?|the|your|my|our|one|some) )?"
    ),
    "line": r"^[ \t]*(?:\#{1,6}[ \t]*|[->*•][ \t]*|\d+[.)][ \t]*|[\(\[`\"]+)*(?:(?:the|my|an?) )?",
    "heading": r"(?: below| above)?[ \t`\")\]]*(?::|$)",
}


def _phrase(spelt: str, *needs: str) -> _Phrase:
    """A pattern in which `<name>` stands for a piece, and what it needs: words with bars between, or a `<name>`."""
    filled = re.sub(r"(?<!\?P)<(\w+)>", lambda piece: _PIECES[piece[1]], spelt)
    words = (re.sub(r"<(\w+)>", lambda named: _WORDS[named[1]].replace(" ", "|"), need) for need in needs)
    return _Phrase(re.compile(filled, re.IGNORECASE | re.MULTILINE), tuple(_alternatives(need) for need in words))


def _alternatives(need: str) -> tuple[str, ...]:
    # "calculations?" is one letter more or less
    return tuple(word.removesuffix("s?") for word in need.split("|"))


_IDENTIFIER = re.compile(r"\b(?:corrected_)?student_solution(?:_[12])?\b|\bteacher[_ ]reasoning\b", re.IGNORECASE)

# an answer is called an answer, and a revised one: no task asks for that; `named`: unless the task has such a thing
_OF_AN_ANSWER = (
    _phrase(
        r"\b(?:this|the|my|our|your|in|as an?|following) <words><revised><gap><answer>(?! of\b)<end>",
        "<revised>",
        "<answer>",
    ),
    _phrase(r"<here><words><revised><gap><answer><end>", "<revised>", "<answer>"),
    _phrase(r"<line><revised><gap>(?:student(?:'s)? )?<answer><heading>", "<revised>", "<answer>"),
    _phrase(
        r"\b(?:here|this)(?:'s| is) an? (?:clearer|better|more (?:accurate|correct|engaging))<gap><answer><end>",
        "clearer|better|accurate|correct|engaging",
        "<answer>",
    ),
    _phrase(
        r"\bclear(?:er)?,? (?:and )?more (?:correct|accurate),? and (?:more )?engaging\b",
        "engaging",
        "correct|accurate",
    ),
    _phrase(
        r"(?<!\ba )(?<!\beach )\b(?P<named>student)(?:'s|s')? (?:\w+ ){0,2}(?:answer|solution|response|submission"
        r"|attempt|explanation|wording|structure|mistakes?|errors?)\b",
        "student",
    ),
    _phrase(r"\b(?:provided|given|written|made|presented|submitted) by the (?P<named>student)\b", "by the student"),
    _phrase(
        r"\bthe (?P<named>student) (?:should have|could have|forgot|failed|misunderst\w+|mistakenly|incorrectly"
        r"|correctly|attempted|missed|confused|omitted|overlooked|stated|mentioned"
        r"|made (?:an? |some |several )?(?:\w+ )?(?:mistake|error)s?)\b",
        "the student ",
    ),
    _phrase(
        r"\b(?:the|your|my|our|this|that) (?P<named>(?:original|previous|earlier|prior|initial) (?:answer|explanation"
        r"|attempt))<end>",
        "<earlier>",
        "answer|explanation|attempt",
    ),
    _phrase(
        r"\b(?:the|your|my|our) (?P<named>(?:original|previous|earlier|prior) (?:response|reply|solution))"
        r"(?! by\b)<end>",
        "<earlier>",
        "response|reply|solution",
    ),
    _phrase(
        r"\bthe (?P<named>(?:original|previous|earlier|prior|initial) (?:<answer>|<text>|statement|version))"
        r" (?:mistakenly|incorrectly|wrongly|erroneously)\b",
        "mistakenly|incorrectly|wrongly|erroneously",
        "<earlier>",
    ),
    _phrase(
        r"\bthe (?:given|provided) (?P<named><answer>) (?:contains?|ha[sd]) (?:an?|some|several|the) (?:\w+ )?"
        r"(?:error|mistake)s?\b",
        "the given|the provided",
        "error|mistake",
    ),
    _phrase(
        r"\b(?:the|this|my) (?:answer|solution|response) (?:has|have) (?:now )?been (?:\w+ly )?<revised>\b",
        "<revised>",
        "answer ha|solution ha|response ha",
    ),
    _phrase(
        r"\b(?:i|we)(?:'ve| have)? (?:\w+ ){0,2}?<edited> (?:upon |on )?(?:the|this|your|my|that) (?:\w+"
        r" ){0,2}?<answer><end>",
        "<revised>|rewrote|redid|streamlined",
        "<answer>",
    ),
    _phrase(
        r"\b(?:revision|correction|improvement|rewrite|<revised> version) (?:of|to|on|over) (?:the|your|my|this|that)"
        r" (?:\w+ )?"
        r"<answer><end>",
        "revision|correction|improvement|rewrite|<revised>",
        "<answer>",
    ),
    _phrase(
        r"\bthis (?:answer|solution|response|version|explanation) (?:\w+ )?(?:(?:improves|builds|expands) (?:up)?on"
        r" (?:the|your)"
        r" (?:original|previous|initial|earlier)|(?:corrects|fixes|rectifies|revises) (?:the|your|all|any|these|those"
        r"|some))\b",
        "this answer|this solution|this response|this version|this explanation",
        "improves|builds|expands|corrects|fixes|rectifies|revises",
    ),
)
_OVER = r"[ \t`\")»”」】]*(?:[:：]|$)"


def _after(answer: str, revised: str, here: str, student: str) -> tuple[_Phrase, ...]:
    """In a language that says `answer revised`.

    The texts are regular expressions; `here` goes on to the answer, and `student` names him as `named`.
    """
    return (
        _phrase(rf"<line>(?P<named>{answer}) (?:\w+ (?:y|e|et) )?(?:{revised}){_OVER}", answer),
        _phrase(rf"\b(?:{here}) (?P<named>{answer}) (?:{revised})\b", answer),
        _phrase(rf"\bvers(?:ion|ión|ão|ione) (?:{revised}) d\w{{1,4}} (?:\w{{2,5}} )?(?P<named>{answer})\b", answer),
        _phrase(rf"\b{answer} (?:{student})\b", answer),
    )


def _before(answer: str, revised: str, here: str, student: str) -> tuple[_Phrase, ...]:
    """In a language that says `revised answer`."""
    named = rf"(?P<named>{answer})(?!\w)"
    return (
        _phrase(rf"<line>(?:{revised}) {named}{_OVER}", answer),
        _phrase(rf"\b(?:{here}) (?:{revised}) {named}", answer),
        _phrase(rf"\b{answer}[ае]? (?:{student})\b", answer),
    )


_ELSEWHERE = (
    # Spanish, Portuguese, French, Italian
    *_after(
        "respuesta",
        "corregida|revisada|mejorada|reescrita",
        "(?:aquí (?:está|tienes|tiene|va)|(?:esta|la siguiente) es) (?:la|una|mi)",
        "del (?P<named>estudiante|alumno)",
    ),
    *_after(
        "resposta",
        "corrigida|revisada|melhorada|aprimorada|reescrita",
        "(?:aqui (?:está|vai)|esta é|segue) (?:a|uma|minha)",
        "do (?P<named>estudante|aluno)",
    ),
    *_after(
        "réponse",
        "corrigée|révisée|améliorée|remaniée|reformulée",
        "(?:voici|ceci est|c'est) (?:la|une|ma)",
        "de l'(?P<named>élève|étudiant)",
    ),
    *_after(
        "risposta",
        "rivista|riveduta|migliorata|riformulata",
        "(?:ecco|questa è) (?:la|una|la mia)",
        "dello (?P<named>studente)",
    ),
    # German, Russian
    *_before(
        "antwort",
        "korrigierte|überarbeitete|verbesserte|revidierte",
        "(?:hier|dies|das|nachfolgend|folgendes) ist (?:die|eine|meine)",
        "de[rs] (?P<named>schüler|studenten)(?:in|s)?",
    ),
    *_before(
        "ответ",
        "исправленный|улучшенный|переработанный|доработанный",
        "вот|это",
        "(?P<named>студент|ученик)а",
    ),
    # Chinese, Japanese, Korean: no spaces between words, or other words
    _phrase(
        r"(?:(?:以下|[这這]|下面)是[^。，\n]{0,4}?|<line>)(?:修改|修[订訂]|改[进進]|更正|修正|[优優]化|完善)[过過后後]?的?"
        r"(?P<named>答案|回答|解答)(?=[ \t`\"”」】。，,!！]*(?:[:：]|$))",
        "答案|回答|解答",
    ),
    _phrase(r"(?P<named>[学學]生)的(?:回答|答案|解答)", "学生的|學生的"),
    _phrase(
        r"(?:(?:以下|これ|こちら)[はが][^。、\n]{0,6}?|<line>)(?:修正|改訂|改善|訂正)(?:後の|済みの|版の|された|した)"
        r"(?P<named>回答|答え|解答)(?=です|[ \t`\"」】。]*(?:[:：]|$))",
        "回答|答え|解答",
    ),
    _phrase(r"(?P<named>学生|生徒)の(?:回答|答え|解答)", "学生の|生徒の"),
    _phrase(
        r"(?:\b(?:다음|아래|이것)[은는][^.,\n]{0,6}? |<line>)(?:수정|개선|교정|보완)[된한] (?P<named>답변|답안)"
        r"(?=입니다|[ \t`\"”]*(?:[:：.]|$))",
        "답변|답안",
    ),
    _phrase(r"(?P<named>학생)의 (?:답변|답안)", "학생의"),
)
"""How other languages speak of a revised answer; `named` as above."""
# a text or some code is called a revised one, or changes are reported: what a task of editing asks for
_OF_A_TEXT = (
    _phrase(r"<here><words><revised><gap><text><of_writing><end>", "<revised>", "<text>"),
    _phrase(
        r"\b(?:here(?:'s| is) an?|this) (?:clearer|better|more (?:accurate|correct|engaging))<gap>version"
        r"<of_writing><end>",
        "version",
        "clearer|better|accurate|correct|engaging",
    ),
    _phrase(
        r"\bin (?:the|this|my|our) <words>(?:corrected|revised|improved|rewritten)<gap><text>(?=[,:])",
        "corrected|revised|improved|rewritten",
    ),
    _phrase(r"\b(?:this|my) <words><reworded><gap><text><of_writing><end>", "<reworded>"),
    _phrase(r"\b(?:this|my) <words><polished><gap>(?:version|text|<code>)<of_writing><end>", "<polished>"),
    _phrase(
        r"\b(?:in )?the <words>(?:<reworded>|improved)<gap>(?:version|<code>)(?=[:,]| (?:above|below"
        r"|is (?:as follows|below|here|given|shown)|is:|should|would|will|now|ensures|includes|provides|addresses"
        r"|maintains|looks|uses)\b)",
        "<reworded>|improved",
        "version|<code>",
    ),
    _phrase(r"<line><revised><gap><text><heading>", "<revised>", "<text>"),
    _phrase(
        r"<line>(?:(?:corrected|improved|rewritten)[`\")\]]*:"
        r"|(?:corrected|revised|improved|rewritten)[`\")\]]*:?[ \t]*$)",
        "corrected|revised|improved|rewritten",
    ),
    _phrase(
        r"\b(?:i|we)(?:'ve| have) (?:\w+ ){0,2}?<edited> (?:the|this|your|some|several|a few|all|these|those|any)"
        r" (?:\w+ ){0,3}?<mistakes><end>",
        "<revised>|rewrote|redid|streamlined",
    ),
    _phrase(
        r"\b(?:i|we)(?:'ve| have)? (?:also )?made (?:\w+ ){0,3}?(?:corrections?|improvements?|changes|edits|adjustments"
        r"|revisions)"
        r" to (?:the|your|this) (?:\w+ )?(?:<answer>|<text>)<end>",
        "made ",
        "correction|improvement|changes|edits|adjustments|revisions",
    ),
    _phrase(
        r"\b(?:the|this) <code> (?:above |below )?(?:has|have) (?:now )?been (?:\w+ly )?<revised>\b",
        "<revised>",
        "been ",
    ),
    _phrase(
        r"\blet(?:'s| us) (?:correct|revise|rectify|rework) (?:the|this|your|that|some|these)\b",
        "let's |let us ",
        "correct|revise|rectify|rework",
    ),
    _phrase(
        r"\b(?:the|these|those) (?:corrections|revisions) (?:include|made|are|were|above|below)\b",
        "corrections|revisions",
    ),
    _phrase(
        r"\b(?:in|with|through) (?:this|these|the above|the following) (?:corrections?|revisions?|edits)<end>",
        "correction|revision|edits",
    ),
    _phrase(
        r"\bno (?:further |other )?(?:changes|corrections|revisions|edits) (?:are|were)"
        r" (?:needed|necessary|required)\b",
        "changes|corrections|revisions|edits",
        "needed|necessary|required",
    ),
    _phrase(
        r"<line>(?:note|edit|correction): ?(?:i(?:'ve| have)? )?(?:fixed|corrected|changed|replaced|revised|reworded"
        r"|rewrote|kept|modified|removed) (?:the|your|some|all|only)\b",
        "note:|edit:|correction:",
    ),
    _phrase(
        r"\b(?:this|these|the above|my) (?:corrections?|revisions?|rewrites?) (?:\w+ly )?(?:ensures?|makes?|provides?"
        r"|addresses?|keeps?"
        r"|maintains?|improves?|clarif(?:y|ies)|fix(?:es)?|aims?|should|will|offers?|gives?|adds?|includes?"
        r"|is (?:now )?(?:clearer|more))\b",
        "correction|revision|rewrite",
    ),
    _phrase(
        r"<line>(?:key |main |(?:summary|explanation|list) of |the )*(?:changes|corrections|revisions|improvements"
        r"|edits|modifications) (?:i |that were |i've )?made\b",
        "changes|corrections|revisions|improvements|edits|modifications",
        "made",
    ),
    _phrase(
        r"<line>(?:key |main |(?:summary|explanation|list) of |the )+(?:corrections|revisions|edits)<heading>",
        "corrections|revisions|edits",
    ),
    _phrase(r"<line>(?:corrections|revisions?)[ \t`\")\]]*:[ \t]*$", "corrections|revision"),
    _phrase(
        r"\b<reworded> (?:here |slightly )?for (?:\w+ )?(?:clarity|accuracy|correctness|readability|conciseness|brevity"
        r"|grammar"
        r"|engagement)\b",
        "<reworded>",
        "clarity|accuracy|correctness|readability|conciseness|brevity|grammar|engagement",
    ),
    _phrase(
        r"[\(\[](?:corrected|revised|improved|edited)(?: (?:answer|solution|response|version))?[\)\]]",
        "corrected|revised|improved|edited",
    ),
    _phrase(
        r"(?:\#|//|/\*|<!--) ?(?:corrected|revised|fixed)(?::| (?:the|from|to|line|condition|logic|import|function|code"
        r"|syntax"
        r"|indentation|typo|spelling|variable|version)\b)",
        "corrected|revised|fixed",
    ),
)
_PHRASES = (*_OF_AN_ANSWER, *_ELSEWHERE, *_OF_A_TEXT)


_WRITING = _any(
    "texts? sentences? paragraphs? essay code e-?mail letter writing answer response story poem article description"
    " statement resume cv summary draft wording function query prompt script program document content title headline"
    " bio"
    " paper speech phrase passage blog post following below given message grammar spelling punctuation errors?"
    " mistakes?"
    " typos? bugs? translation abstract review report dialogue lines? recipe snippet"
)
_ASKS_TO_EDIT = re.compile(
    r"\b(?:re-?writ(?:e|ing)|(?:re|para)phras(?:e|ing)|reword(?:ing)?|proof-?read(?:ing)?|(?:copy)?edit(?:ing)?"
    r"|revis(?:e|ing|ion)"
    r"|debug(?:ging)?|refactor(?:ing)?|grammar|grammatical(?:ly)?)\b"
    r"|\b(?:improv(?:e|ing)|enhanc(?:e|ing)|polish(?:ing)?|refin(?:e|ing)|optimi[sz](?:e|ing)|fix(?:ing)?|amend(?:ing)?"
    # "the correct output" asks for no correction
    r"|correcting|correct(?= (?:the|this|my|any|all|these|those|it|and|following|spelling|punctuation|errors?"
    r"|mistakes?|typos?)\b)"
    rf"|restructur(?:e|ing)|rework(?:ing)?|clean(?:ing)? up|review(?:ing)?"
    rf"|feedback)(?:\W+[\w'-]+){{0,8}}?\W+{_WRITING}\b"
    r"|\b(?:errors?|mistakes?|bugs?|typos?|wrong) (?:in|with) (?:this|my|the|these|following)\b"
    r"|\b(?:be|been|is|are|and|or|an?|any|version) (?:\w+ ){0,2}(?:rewritten|corrected|edited|revised|proofread"
    r"|re(?:word|phras)ed)\b",
    re.IGNORECASE,
)
_ASKS_TO_CHANGE = re.compile(
    r"\b(?:modify|change|update|convert|adapt|transform|adjust|extend|add|turn|make|shorten|simplify|expand"
    r"|translate)\b",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    rf"\b{_any('updated modified edited rewritten revised adjusted reworked refined')}\b", re.IGNORECASE
)
