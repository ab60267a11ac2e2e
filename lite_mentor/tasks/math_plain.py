"""Questions that need no tool: they state their answer. Each looks like one of math_short.py that does need one."""

from __future__ import annotations

from lite_mentor.tasks.math_short import FIELDS, GOODS
from lite_mentor.tasks.templates import Template

# fmt: off
PLAIN = (
    Template("stated_rows", {"rows": (112, 480), "seats": (23, 98)}, (
        "A {hall} has {rows} rows with {seats} seats in each row. How many rows does it have?",
        "Every one of the {rows} rows in a {hall} has {seats} seats. How many rows are there?",
    ), (), {"hall": ("theatre", "stadium", "concert hall", "cinema")}, answer="rows"),
    Template("stated_hours", {"hours": (27, 168), "rate": (11.15, 48.95, 2)}, (
        "{person} works {hours} hours and earns {rate} dollars an hour. How many hours does {person} work?",
        "{person} gets {rate} dollars an hour for {hours} hours of work. For how many hours is {person} paid?",
    ), (), answer="hours"),
    Template("stated_width", {"length": (41.3, 98.7, 1), "width": (12.3, 40.9, 1)}, (
        "A rectangular {field} is {length} metres long and {width} metres wide. How many metres wide is it?",
        "A {field} measures {length} metres by {width} metres. How long is its shorter side, in metres?",
    ), (), {"field": FIELDS}, answer="width"),
    Template("stated_day", {"first": (1204, 9876), "second": (1204, 9876)}, (
        "{first} people visited a {place} on Saturday and {second} on Sunday. How many people came on Sunday?",
        "A {place} had {first} visitors in May and {second} visitors in June. How many visitors did it have in June?",
    ), (), {"place": ("museum", "zoo", "castle", "fair", "library")}, answer="second"),
    Template("stated_sold", {"total": (4213, 9876), "sold": (1021, 4187)}, (
        "A warehouse stores {total} {goods} and ships {sold} of them. How many {goods} does it ship?",
        "Of {total} {goods} in a shop, {sold} have been sold. How many have been sold?",
    ), (), {"goods": GOODS}, answer="sold"),
    Template("stated_price", {"paid": (60, 150), "price": (21.15, 59.85, 2)}, (
        "{person} pays a bill of {price} dollars with {paid} dollars. How many dollars is the bill?",
        "A jacket costs {price} dollars. {person} hands over {paid} dollars. What does the jacket cost, in dollars?",
    ), (), answer="price"),
    Template("stated_way", {"hours": (2.3, 9.9, 1), "way": (121, 989)}, (
        "A {vehicle} covers {way} kilometres in {hours} hours. How many kilometres does it cover?",
        "{person} travels {way} kilometres by {vehicle} in {hours} hours. How many kilometres does {person} travel?",
    ), (), {"vehicle": ("bus", "train", "car", "truck")}, answer="way"),
    Template("stated_first", dict.fromkeys("abcde", (112, 989)), (
        "From Monday to Friday a shop sold {a}, {b}, {c}, {d} and {e} {goods}. How many {goods} did it sell on Monday?",
        "{person} counts {goods} in five boxes: {a}, {b}, {c}, {d} and {e}. How many {goods} are in the first box?",
    ), (), {"goods": GOODS}, answer="a"),
)
