"""Does a revision speak of being one? Both sides as tables: what must be seen, and what must be left alone."""

from __future__ import annotations

import time

import pytest

from anchored.leak import _PHRASES, _matches, _plain, find_leak

WHY = "Why is the sky blue?"

LEAKS = [
    "In this corrected solution, we check the input against a list.",
    "Here's a corrected and feasible approach:\n\n1. Start.",
    "This revised version keeps the structure but is clearer.",
    "The student's answer is right, and here is why.",
    "The answer above has improved upon the original answer.",
    "**Corrected Answer:**\nThe sky scatters light.",
    "Corrected Solution:\n\nThe sky scatters light.",
    "## Revised Version\n\nThe sky scatters light.",
    "Improved explanation: the sky scatters light.",
    "Here is the revised answer:\n\nThe sky scatters light.",
    "Here's an improved version of the answer:",
    "Here is an enhanced, clearer explanation:",
    "Below is the updated code:\n```python\nprint(1)\n```",
    "I've corrected the code so that it runs.",
    "I have revised the explanation to be more engaging.",
    "I corrected your answer to mention Rayleigh.",
    "The answer has been corrected to mention Rayleigh.",
    "The solution has been slightly revised for clarity.",
    "Unlike the original answer, this one names the cause.",
    "The previous answer was missing the reason.",
    "Compared to the original response, this adds an example.",
    "The original student answer confused red and blue.",
    "As noted in {teacher_reasoning}, light scatters.",
    "The {corrected_student_solution} follows.",
    "The student_solution forgot the units.",
    "Let me provide a corrected version:",
    "Let me present a refined answer.",
    "This improved explanation names the cause.",
    "With these corrections, the program runs.",
    "These corrections ensure that the loop ends.",
    "This revision makes the text easier to read.",
    "**Changes made:**\n- named the cause",
    "### Key corrections\n- named the cause",
    "Corrections:\n1. named the cause",
    "The sky is blue (corrected) because light scatters.",
    "for i in range(10):  # Corrected: was range(9)\n    print(i)",
    "int x = 1; // Corrected the initial value",
    "My revised response is below.",
    "The corrected code above now compiles.",
    "This answer is a revision of the original answer.",
    "This is a clearer, more accurate, and more engaging answer.",
    "Here is a better answer to the question.",
    "*Revised for clarity and accuracy.*",
    "In this **corrected** solution, we check the input.",
    "In this improved, more engaging response, we look at light.",
    "Here’s the corrected version:\nThe sky scatters light.",
    "Here is a rewritten and more engaging response:",
    "The improved solution is as follows: light scatters.",
    "the following revised answer names the cause.",
    "As a corrected answer, we can say that light scatters.",
    "The student's original solution did not handle spaces.",
    "I have fixed the errors in the loop.",
    "I've reworded some sentences to be clearer.",
    "The explanation has been refined.",
    "Updated Answer: 42",
    "Let's correct the mistakes step by step.",
    "The corrections include a new loop.",
    "Corrected:\nLight scatters.",
    "I made some changes to your answer to make it clearer.",
    "A revised version of your answer could read: light scatters.",
    "The code provided by the student did not compile.",
    "This version corrects the claim about the ocean.",
    "This answer builds on the original by naming Rayleigh.",
    "Sure! Here is a slightly improved response:",
    "Here's the revised conversation:",
    "Here is a clearer and corrected version of the story:",
    "The revised explanation is as follows.",
    "The corrected version is below:",
    "Here's the corrected C++ program:",
    "The initial answer mistakenly said Sydney.",
    "The above corrections make the code compile.",
    "The student should have used getline.",
    "In the revised conversation, the agent is kinder.",
    "Improved and corrected response below:",
    "(Revised answer) The sky is blue.",
    "Here's a more accurate and engaging version:",
    "This more engaging version keeps the facts.",
    "Note: the original solution used the wrong formula.",
    "We have corrected the calculation.",
    "To improve upon the original answer, consider this.",
    "Note: I changed the date from 1945 to 1944.",
    "**Note:** I've corrected the temperature.",
    "Light scatters.\n\n[Edit: fixed the unit]",
    "(The previous response said that it is the ocean.)",
    "The original text mistakenly mentioned Mie scattering.",
    "The given solution contains an error in the second line.",
    "The student overlooked the atmosphere.",
    "The student made several mistakes.",
    "I've kept the student's structure.",
    "No changes were needed. Light scatters.",
    "My revision keeps the wording where it can.",
    "Light scatters.\n\n---\n\nThis revision is clearer.",
]

ORDINARY = [
    "Apple released an improved version of the iPhone in 2012.",
    "See the revised edition of the book.",
    "Install the updated version of Python first.",
    "A cache gives improved response time.",
    "Hospitals with improved response times save lives.",
    "Zero trust is an enhanced approach to security.",
    "The controller keeps correcting deviations in real time.",
    "The correct answer is 42.",
    "A correct solution needs two loops.",
    "Corrected p-values control the error rate.",
    "The company updated its answer to the regulator's questions.",
    "Students answer the questionnaire after class.",
    "Improved solutions for waste management exist.",
    "The initial response to the earthquake was slow.",
    "The student explained that the bus was late.",
    "This enhanced functionality improves recognition.",
    "She revised for her exam all night.",
    "The bill was amended in 1972, and the amended version passed.",
    "Glasses give corrected vision.",
    "Inflation-corrected wages fell.",
    "The solution has been stirred for an hour.",
    "The answer has been known since 1871.",
    "An updated list of members is kept by the clerk.",
    "The improved code review process saves time.",
    "I improved my grades by studying daily.",
    "The original recipe comes from Naples.",
    "The previous president signed the treaty.",
    "The modified Newton method converges faster.",
    "This modified gravity theory explains rotation curves.",
    "Fixed costs do not change with output.",
    "A fixed list of steps keeps pilots safe.",
    "static int fixed = 1; // fixed size buffer",
    "The adjusted analysis accounts for age.",
    "Our improved understanding of light came with Rayleigh.",
    "Polished steel reflects light.",
    "Clear and more accurate clocks followed.",
    "Reading aloud makes stories clearer and more engaging.",
    "This updated version of Python adds pattern matching.",
    "Version 2 improves on the original film in every way.",
    "Here is a list of improved crops: maize, wheat.",
    "Here is how improved seeds help farmers.",
    "He gave a refined answer worthy of a diplomat.",
    "Feedback corrections keep the satellite on course.",
    "A corrected proof was published in 1995.",
    "This revision of the constitution was ratified in 1920.",
    "Here are some modified starch products: E1404.",
    "Here's my plan for an improved garden.",
    "This is a modified version of the Turing test.",
    "The king made changes to the law.",
    "Let's fix the dimension d and let n grow.",
    "I have made several changes to my diet.",
    "This version of events corrects nothing.",
    "Updated: June 2020",
    "The corrected age is used for preterm infants.",
    "The committee presented a revised plan to the council.",
    "Nurses should edit the list of medicines each day.",
    "Here is an updated look at the market.",
    "This is a fixed point of the map.",
    "Here is a simplified explanation of inflation:",
    "Improved version control helps teams.",
    "The following improved varieties are common: Fuji, Gala.",
    "The improved solution of the equation uses Newton's method.",
    "The polished response of the crowd surprised him.",
    "Revision: an important step of writing is to read again.",
    "The original version of the song was released in 1971.",
    "My original plan was to travel by train.",
    "Here is a modified bubble sort that stops early:",
    "Make corrections as needed before you submit.",
    "Your answer to this question shapes your career.",
    "The revised standard version of the Bible appeared in 1952.",
    "We improved the model by adding layers.",
    "For a better version of events, ask her.",
    "An improved immune response follows.",
    "A student's answer is a chance to ask another question.",
    "The student's work was always clear and accurate.",
    "A teacher reads each student's response at night.",
    "The original solution by Archimedes used water.",
    "An earlier answer to the riddle was a river.",
    "Note: fixed costs do not change.",
    "The given solution contains salt.",
    "No changes occurred in the mixture.",
    "No corrections were made to the text of the treaty.",
    "The original theory incorrectly predicted the orbit.",
    "The student wrote home every week.",
]


LEAKS_ELSEWHERE = """
Respuesta corregida:
**Respuesta mejorada:** El cielo dispersa la luz.
Aquí tienes una respuesta revisada:
Esta versión corregida de la respuesta es más clara.
La respuesta del estudiante es correcta.
Resposta corrigida:
Aqui está a resposta revisada: a luz espalha-se.
A resposta do aluno está certa.
Réponse corrigée :
Voici une réponse améliorée :
Voici la version corrigée de la réponse.
La réponse de l'élève est juste.
Risposta corretta e migliorata:
Ecco la risposta rivista:
La risposta dello studente è giusta.
Überarbeitete Antwort:
Hier ist die verbesserte Antwort:
Die Antwort des Schülers ist richtig.
Исправленный ответ:
Вот улучшенный ответ:
В ответе студента есть ошибка.
修改后的答案：
以下是改进后的回答：
这是修订后的回答。
学生的回答是正确的。
修正後的答案：
修正後の回答：
以下は改善された回答です。
学生の回答は正しいです。
수정된 답변:
다음은 개선된 답변입니다.
학생의 답변은 맞습니다.
""".strip().splitlines()

ORDINARY_ELSEWHERE = """
La respuesta correcta es 42.
Una respuesta rápida del equipo mejora los tiempos.
La versión corregida del libro salió en 1990.
La respuesta inmune mejorada protege mejor.
El estudiante respondió a la pregunta del profesor.
A resposta certa é 42.
A resposta imunológica original foi lenta.
La réponse correcte est 42.
Voici une réponse simple : la lumière.
L'élève a donné sa réponse au professeur.
La réponse immunitaire améliorée protège mieux.
La risposta corretta è 42.
La risposta esatta: la luce.
Ecco la risposta:
Die richtige Antwort ist 42.
Hier ist die Antwort:
Eine verbesserte Antwortzeit hilft allen.
Правильный ответ: 42.
Вот ответ:
正确的答案是42。
以下是回答：
改进后的方法更快。
正しい答えは42です。
以下は回答です。
改善された方法は速い。
정답은 42입니다.
다음은 답변입니다.
개선된 방법은 더 빠릅니다.
""".strip().splitlines()


@pytest.mark.parametrize("text", [*LEAKS, *LEAKS_ELSEWHERE])
def test_words_that_speak_of_a_revision_are_a_leak(text: str) -> None:
    assert find_leak(text, WHY, "Because of the ocean.") is not None


@pytest.mark.parametrize("text", [*ORDINARY, *ORDINARY_ELSEWHERE])
def test_words_about_the_world_are_no_leak(text: str) -> None:
    assert find_leak(text, WHY, "Because of the ocean.") is None


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("Rewrite this sentence: him go home", "Here is the rewritten sentence: He goes home."),
        ("Please correct the grammar: him go home", "Corrected sentence: He goes home."),
        ("Fix the bug in my code:\nprint(x", "Here's the corrected code:\nprint(x)"),
        ("What is the error with this code: int f(){}", "Here's the corrected version: int f(){return 0;}"),
        ("Improve the following essay: ...", "Here is an improved version:\n\nOnce upon a time"),
        ("Modify the program to print 10 lines.", "Here is the modified program:\nprint(1)"),
        ("Grade this student's answer: 2+2=5", "The student's answer is wrong: 2+2=4."),
        ("User: Why?\n\nAssistant: The sea.\n\nUser: No.", "My previous answer was wrong: light scatters."),
        ("My previous solution was O(n^2). How do I speed it up?", "Your previous solution compares all pairs."),
        ("How would you edit this paragraph?", "**Revised paragraph:** It rained."),
        ("Mejora esta respuesta: el cielo es azul.", "Respuesta mejorada: el cielo dispersa la luz."),
        ("Améliore cette réponse : le ciel est bleu.", "Voici une réponse améliorée : le ciel diffuse la lumière."),
        ("Bewerte die Lösung des Schülers.", "Die Antwort des Schülers ist richtig."),
        ("请修改这个答案：天空是蓝色的。", "修改后的答案：天空散射光线。"),
        (
            "Explain the slot {corrected_student_solution} of the CLAIR prompt.",
            "{corrected_student_solution} is a slot.",
        ),
    ],
)
def test_a_task_that_is_about_editing_excuses_its_words(task: str, text: str) -> None:
    assert find_leak(text, WHY, "") is not None, "without the task the words would be a leak"
    assert find_leak(text, task, "") is None


def test_a_rejected_answer_that_talks_so_excuses_the_words() -> None:
    text = "I corrected your answer: it is Rayleigh scattering."
    assert find_leak(text, WHY, "Here is my corrected answer: the ocean.") is None
    assert find_leak(text, WHY, "The ocean.") == "I corrected your answer"


def test_a_task_that_only_says_answer_excuses_no_original_answer() -> None:
    task, text = "Answer the question: why is the sky blue?", "The original answer confused red and blue."
    assert find_leak(text, task, "My answer: the ocean.") == "The original answer"


def test_a_change_that_the_task_asks_for_does_not_excuse_a_correction() -> None:
    task = "Modify the C++ code below to use the golden ratio, and explain the correct output."
    assert (
        find_leak("Here's a corrected and feasible approach:", task, "Sure!")
        == "Here's a corrected and feasible approach"
    )


def test_the_first_leak_is_named() -> None:
    assert find_leak("Light scatters. In this\nrevised answer we say so.", WHY, "") == "In this revised answer"


def test_a_long_text_takes_no_noticeable_time() -> None:
    hard = "here is a improved very very very very corrected much more and so on " * 3000
    started = time.process_time()
    find_leak(hard, WHY, hard[:1000])
    assert time.process_time() - started < 10


def test_what_a_phrase_needs_stands_in_every_text_that_it_matches() -> None:
    leaks = (*LEAKS, *LEAKS_ELSEWHERE)
    for text in (*leaks, *ORDINARY, *(f"**{text}**\n\n{text.upper()}" for text in leaks)):
        plain = _plain(text)
        every = [(phrase, match[0]) for phrase in _PHRASES for match in phrase.pattern.finditer(plain)]
        assert [(phrase, match[0]) for phrase, match in _matches(plain)] == every
