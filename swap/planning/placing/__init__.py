"""Where every class of bytes goes, over all tiers at once, so that a step is shortest.

``work`` says what a step asks for, ``network`` what tiers there are and how fast one reaches them,
``choices`` what each place for each class costs, ``solve`` finds the best plan as a mixed-integer
program, ``placement`` is that plan, ``check`` holds it against a walk through the step
(``schedule``). ``reduce`` makes the work out of a traced program. Pure and deterministic.
"""
