"""What a run will need and how long it will take, told before its first step.

``program`` is what one training step does, ``tracing`` finds it out without running it, ``cost``
says how long each part takes on a machine, ``simulate`` runs it on a virtual clock under the plan
that ``attach`` makes, ``predict`` tells the outcome.

``schedule`` says what is moved when, over any tiers; ``timeline`` runs that on a virtual clock.
"""
