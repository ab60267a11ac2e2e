"""Word problems of three to six calls. A template is a block: numbers, wordings, solution, words."""

from __future__ import annotations

from lite_mentor.tasks.templates import Template

# fmt: off
_GOODS = ("chairs", "blankets", "jackets", "shovels", "helmets", "baskets", "kettles", "pillows")

_THREE_CALLS = (
    Template("pallets", {"boxes": (113, 387), "each": (24, 96), "size": (310, 890)}, (
        "{boxes} boxes with {each} {goods} each are repacked into containers that hold {size} {goods}. "
        "How many containers are needed?",
        "A factory fills {boxes} boxes with {each} {goods} each. One truck takes {size} {goods}. "
        "How many trucks are needed for all of them?",
    ), ("multiply boxes each -> the number of {goods}", "divide #1 size -> the number of loads",
        "ceil #2 -> the number of whole loads"), {"goods": _GOODS}),
    Template("two_goods", {"m": (13, 68), "p": (11.15, 48.85, 2), "n": (13, 68), "q": (11.15, 48.85, 2)}, (
        "{person} buys {m} {goods} at {p} dollars each and {n} tables at {q} dollars each. "
        "How many dollars does everything cost?",
        "A hotel orders {m} {goods} for {p} dollars each and {n} lamps for {q} dollars each. "
        "What is the total price in dollars?",
    ), ("multiply m p -> the cost of the {goods}", "multiply n q -> the cost of the other items",
        "add #1 #2 -> the total cost"), {"goods": _GOODS}),
    Template("average_rounded", dict.fromkeys("abcdef", (112.1, 988.9, 1)), (
        "Six {things} weigh {a}, {b}, {c}, {d}, {e} and {f} kilograms. "
        "What is their mean weight in kilograms, rounded to 2 decimals?",
        "{person} measures {a}, {b}, {c}, {d}, {e} and {f} grams. What is the average, rounded to 2 decimals?",
    ), ("sum_numbers a b c d e f -> the sum", "divide #1 6 -> the average", "round_number #2 2 -> the rounded average"),
        {"things": ("horses", "stones", "engines", "bells")}),
    Template("sale", {"price": (213, 987), "percent": (12, 48)}, (
        "A {device} costs {price} dollars and is sold with {percent} percent off. What is the new price in dollars?",
        "{person} gets a discount of {percent} percent on a {device} of {price} dollars. "
        "How many dollars does {person} pay?",
    ), ("multiply price percent -> the price times the percentage", "divide #1 100 -> the discount",
        "subtract price #2 -> the new price"), {"device": ("sofa", "bicycle", "guitar", "stove", "telescope")}),
    Template("sticker_albums", {"packs": (23, 98), "each": (12, 36), "extra": (113, 489), "page": (17, 43)}, (
        "{person} has {packs} packs of {each} stickers and {extra} loose ones, and fills pages of {page} stickers. "
        "How many stickers are left over?",
        "{packs} bundles of {each} cards and {extra} single cards are dealt into piles of {page}. "
        "How many cards remain?",
    ), ("multiply packs each -> the number in packs", "add #1 extra -> the total number",
        "modulo #2 page -> what is left over")),
    Template("guess", {"rows": (34, 98), "each": (34, 98), "guess": (1500, 8900)}, (
        "A jar holds {rows} layers of {each} beans. {person} guesses that there are {guess} beans. "
        "By how many beans is the guess wrong?",
        "An orchard has {rows} rows of {each} trees. {person} estimates {guess} trees. "
        "How far is the estimate from the true number?",
    ), ("multiply rows each -> the true number", "subtract guess #1 -> the difference",
        "abs_value #2 -> the size of the error")),
    Template("profit", {"income": (6213.15, 9876.85, 2), "costs": (1213.15, 4876.85, 2), "people": (7, 38)}, (
        "A {club} earns {income} dollars and spends {costs} dollars. Its {people} members share the rest equally. "
        "How many dollars does each get, rounded to 2 decimals?",
        "After {costs} dollars of costs, the income of {income} dollars is divided among {people} members of a {club}. "
        "What does each receive in dollars, rounded to 2 decimals?",
    ), ("subtract income costs -> the profit", "divide #1 people -> the share of each",
        "round_number #2 2 -> the rounded share"), {"club": ("band", "choir", "team", "farm")}),
    Template("paint", {"length": (23.1, 89.9, 1), "height": (3.1, 9.9, 1), "cover": (12, 38)}, (
        "A wall is {length} metres long and {height} metres high. One can of paint covers {cover} square metres. "
        "How many cans must {person} buy?",
        "{person} covers a floor of {length} by {height} metres with carpet sold in rolls of {cover} square metres. "
        "How many rolls are needed?",
    ), ("multiply length height -> the area", "divide #1 cover -> the amount needed",
        "ceil #2 -> the whole number needed")),
    Template("interest", {"start": (213, 987), "factor": (1.013, 1.089, 3), "years": (4, 12)}, (
        "{person} saves {start} dollars, and each year the sum is multiplied by {factor}. "
        "How many dollars is it after {years} years, rounded to 2 decimals?",
        "A fund of {start} dollars is multiplied by {factor} every year. "
        "What is it worth after {years} years, in dollars, rounded to 2 decimals?",
    ), ("power factor years -> the growth over all years", "multiply start #1 -> the final amount",
        "round_number #2 2 -> the rounded amount")),
    Template("same_area", {"length": (112, 489), "width": (31, 98)}, (
        "A field of {length} by {width} metres is swapped for a square one of the same area. "
        "How long is a side of the square in metres, rounded to 2 decimals?",
        "Find the side of the square that has the same area as a {length} by {width} rectangle, rounded to 2 decimals.",
    ), ("multiply length width -> the area", "sqrt #1 -> the side", "round_number #2 2 -> the rounded side")),
    Template("overtime", {"a": (31, 48), "b": (31, 48), "c": (31, 48), "rate": (21.15, 48.85, 2),
                          "tax": (113, 987)}, (
        "{person} works {a}, {b} and {c} hours in three weeks for {rate} dollars an hour. The tax is {tax} dollars. "
        "How many dollars does {person} keep?",
        "In three weeks {person} rents out a boat for {a}, {b} and {c} hours at {rate} dollars an hour. "
        "Repairs cost {tax} dollars. How many dollars remain?",
    ), ("sum_numbers a b c -> the number of hours", "multiply #1 rate -> the income",
        "subtract #2 tax -> what remains")),
)

_FOUR_CALLS = (
    Template("ladder", {"m": (13, 37), "n": (3, 12), "a": lambda n: n["m"] ** 2 - n["n"] ** 2,
                        "b": lambda n: 2 * n["m"] * n["n"]}, (
        "{person} walks {a} metres east and then {b} metres north. "
        "How many metres is {person} from the start, in a straight line?",
        "A rectangular park is {a} metres long and {b} metres wide. How long is its diagonal in metres?",
    ), ("power a 2 -> the square of the first side", "power b 2 -> the square of the second side",
        "add #1 #2 -> the sum of the squares", "sqrt #3 -> the length")),
    Template("change_of_two", {"m": (13, 38), "p": (11.15, 28.85, 2), "n": (13, 38), "q": (11.15, 28.85, 2),
                               "paid": (2300, 4900)}, (
        "{person} has {paid} dollars and buys {m} {goods} at {p} dollars each and {n} ropes at {q} dollars each. "
        "How many dollars are left?",
        "From {paid} dollars a camp pays for {m} {goods} at {p} dollars each and {n} tents at {q} dollars each. "
        "How many dollars remain?",
    ), ("multiply m p -> the cost of the {goods}", "multiply n q -> the cost of the other items",
        "add #1 #2 -> the total cost", "subtract paid #3 -> what is left"), {"goods": _GOODS}),
    Template("offers", {"m": (13, 68), "p": (11.15, 48.85, 2), "n": (13, 68), "q": (11.15, 48.85, 2)}, (
        "One shop asks {p} dollars a piece for {m} {goods}, another asks {q} dollars a piece for {n}. "
        "By how many dollars do the two totals differ?",
        "{person} sells {m} {goods} at {p} dollars each, {person2} sells {n} at {q} dollars each. "
        "What is the difference of their incomes in dollars?",
    ), ("multiply m p -> the first total", "multiply n q -> the second total", "subtract #1 #2 -> the difference",
        "abs_value #3 -> the size of the difference"), {"goods": _GOODS}),
    Template("target", {"a": (1112, 9889), "b": (1112, 9889), "c": (1112, 9889), "d": (1112, 9889),
                        "goal": (4000, 7000)}, (
        "{person} walked {a}, {b}, {c} and {d} steps on four days; the goal is {goal} steps a day. "
        "By how many steps does the daily average miss or exceed the goal?",
        "Four games had {a}, {b}, {c} and {d} viewers. How far is the average from the {goal} viewers expected?",
    ), ("sum_numbers a b c d -> the sum", "divide #1 4 -> the average", "subtract #2 goal -> the difference",
        "abs_value #3 -> the size of the difference")),
    Template("buses", {"a": (113, 489), "b": (113, 489), "c": (113, 489), "size": (23, 58), "price": (213, 487)}, (
        "Three schools with {a}, {b} and {c} pupils go on a trip. A bus seats {size} and costs {price} dollars. "
        "How many dollars do all the buses cost?",
        "Groups of {a}, {b} and {c} guests are carried by boats that take {size} guests and cost {price} dollars each. "
        "What do the boats cost in total, in dollars?",
    ), ("sum_numbers a b c -> the number of people", "divide #1 size -> the number of loads",
        "ceil #2 -> the number of vehicles", "multiply #3 price -> the total cost")),
    Template("lawn", {"length": (41.3, 89.9, 1), "width": (21.3, 40.9, 1), "pond": (113.1, 487.9, 1),
                      "price": (2.15, 9.85, 2)}, (
        "A garden of {length} by {width} metres has a pond of {pond} square metres. Lawn for the rest costs {price} "
        "dollars per square metre. What does it cost in dollars, rounded to 2 decimals?",
        "{person} tiles a yard of {length} by {width} metres, leaving out {pond} square metres. Tiles cost {price} "
        "dollars per square metre. What is the cost in dollars, rounded to 2 decimals?",
    ), ("multiply length width -> the whole area", "subtract #1 pond -> the area to cover",
        "multiply #2 price -> the cost", "round_number #3 2 -> the rounded cost")),
    Template("also_buys", {"money": (2213, 4987), "count": (23, 68), "price": (11.15, 28.85, 2),
                           "other": (7.15, 19.85, 2)}, (
        "{person} has {money} dollars and buys {count} {goods} at {price} dollars each. "
        "How many pens at {other} dollars each can {person} buy with the rest?",
        "With {money} dollars a club buys {count} {goods} for {price} dollars each and then as many balls as possible "
        "for {other} dollars each. How many balls does it get?",
    ), ("multiply count price -> the cost of the {goods}", "subtract money #1 -> the money left",
        "divide #2 other -> how many fit", "floor #3 -> the whole number"), {"goods": _GOODS}),
)

_FIVE_CALLS = (
    Template("straight_line", {"a": (113, 987), "b": (113, 987)}, (
        "A ship sails {a} kilometres west and then {b} kilometres south. "
        "How many kilometres is it from the start in a straight line, rounded to 1 decimal?",
        "A screen is {a} millimetres wide and {b} millimetres high. "
        "How many millimetres is its diagonal, rounded to 1 decimal?",
    ), ("power a 2 -> the square of the first length", "power b 2 -> the square of the second length",
        "add #1 #2 -> the sum of the squares", "sqrt #3 -> the distance", "round_number #4 1 -> the rounded distance")),
    Template("harvest", {"m": (34, 98), "p": (34, 98), "n": (34, 98), "q": (34, 98), "size": (48, 96)}, (
        "{person} picks {m} baskets of {p} apples and {n} baskets of {q} pears. "
        "A crate holds {size} fruits. How many crates are needed?",
        "A press prints {m} stacks of {p} posters and {n} stacks of {q} maps. One tube holds {size} sheets. "
        "How many tubes are needed?",
    ), ("multiply m p -> the number of the first kind", "multiply n q -> the number of the second kind",
        "add #1 #2 -> the total number", "divide #3 size -> the number of loads",
        "ceil #4 -> the whole number needed")),
    Template("bulk_sale", {"count": (23, 98), "price": (12.15, 88.85, 2), "percent": (11, 39)}, (
        "{person} orders {count} {goods} at {price} dollars each and gets {percent} percent off the total. "
        "How many dollars is that, rounded to 2 decimals?",
        "{count} {goods} cost {price} dollars each, less {percent} percent on the whole order. "
        "What is to be paid in dollars, rounded to 2 decimals?",
    ), ("multiply count price -> the full price", "multiply #1 percent -> the price times the percentage",
        "divide #2 100 -> the discount", "subtract #1 #3 -> the reduced price",
        "round_number #4 2 -> the rounded price"), {"goods": _GOODS}),
    Template("tip", {"a": (11.15, 48.85, 2), "b": (11.15, 48.85, 2), "c": (11.15, 48.85, 2), "percent": (11, 24)}, (
        "{person} orders dishes for {a}, {b} and {c} dollars and adds a tip of {percent} percent. "
        "How many dollars is that in all, rounded to 2 decimals?",
        "Parts for {a}, {b} and {c} dollars are taxed at {percent} percent. "
        "What is the total with tax in dollars, rounded to 2 decimals?",
    ), ("sum_numbers a b c -> the sum", "multiply #1 percent -> the sum times the percentage",
        "divide #2 100 -> the extra amount", "add #1 #3 -> the total", "round_number #4 2 -> the rounded total")),
    Template("towers", {"packs": (34, 98), "each": (48, 96), "lost": (113, 989), "tray": (13, 37), "tower": (7, 23)}, (
        "A mint makes {packs} rolls of {each} coins and melts {lost} coins. The rest go into full trays of {tray}. "
        "The full trays are stacked in towers of {tower}. How many trays are left over?",
        "{person} has {packs} bags of {each} seeds and throws {lost} seeds away. The others are sown in full rows of "
        "{tray}, and the full rows form beds of {tower} rows. How many full rows are left over?",
    ), ("multiply packs each -> the number at first", "subtract #1 lost -> the number kept",
        "divide #2 tray -> the number of groups", "floor #3 -> the number of full groups",
        "modulo #4 tower -> what is left over")),
)

_SIX_CALLS = (
    Template("split_bill", {"a": (21.15, 88.85, 2), "b": (21.15, 88.85, 2), "c": (21.15, 88.85, 2),
                            "percent": (11, 24), "people": (3, 9)}, (
        "{people} friends order dishes for {a}, {b} and {c} dollars, add a tip of {percent} percent and share equally. "
        "How many dollars does each pay, rounded to 2 decimals?",
        "A bill of {a}, {b} and {c} dollars plus {percent} percent service is split among {people} people. "
        "What does each pay in dollars, rounded to 2 decimals?",
    ), ("sum_numbers a b c -> the sum", "multiply #1 percent -> the sum times the percentage",
        "divide #2 100 -> the tip", "add #1 #3 -> the total", "divide #4 people -> the share of each",
        "round_number #5 2 -> the rounded share")),
    Template("average_speed", {"v": (43, 118), "s": (2.1, 6.9, 1), "w": (43, 118), "t": (2.1, 6.9, 1)}, (
        "A train runs {s} hours at {v} kilometres per hour and {t} hours at {w} kilometres per hour. "
        "What is its average speed in kilometres per hour, rounded to 2 decimals?",
        "{person} drives at {v} kilometres per hour for {s} hours, then at {w} for {t} hours. "
        "What is the average speed of the whole trip, rounded to 2 decimals?",
    ), ("multiply v s -> the first distance", "multiply w t -> the second distance", "add #1 #2 -> the whole distance",
        "add s t -> the whole time", "divide #3 #4 -> the average speed", "round_number #5 2 -> the rounded speed")),
    Template("two_points", {"m": (13, 37), "n": (3, 12), "x": (113, 987), "y": (113, 987),
                            "x2": lambda n: n["x"] + n["m"] ** 2 - n["n"] ** 2,
                            "y2": lambda n: n["y"] + 2 * n["m"] * n["n"]}, (
        "On a map, a tower stands at ({x}, {y}) and a mill at ({x2}, {y2}). What is the distance between them?",
        "How far is the point ({x2}, {y2}) from the point ({x}, {y})?",
    ), ("subtract x2 x -> the difference of the first coordinates",
        "subtract y2 y -> the difference of the second coordinates", "power #1 2 -> the square of the first difference",
        "power #2 2 -> the square of the second difference", "add #3 #4 -> the sum of the squares",
        "sqrt #5 -> the distance")),
    Template("two_walls", {"a": (23.1, 89.9, 1), "b": (3.1, 9.9, 1), "c": (23.1, 89.9, 1), "d": (3.1, 9.9, 1),
                           "cover": (12, 38), "price": (21.15, 68.85, 2)}, (
        "Two walls measure {a} by {b} metres and {c} by {d} metres. One can of paint covers {cover} square metres and "
        "costs {price} dollars. How many dollars does {person} pay for enough cans?",
        "{person} covers floors of {a} by {b} and {c} by {d} metres with rolls of {cover} square metres at {price} "
        "dollars a roll. What do the rolls cost in dollars?",
    ), ("multiply a b -> the first area", "multiply c d -> the second area", "add #1 #2 -> the whole area",
        "divide #3 cover -> the amount needed", "ceil #4 -> the whole number needed", "multiply #5 price -> the cost")),
    Template("plans", {"m": (13, 68), "p": (2.15, 8.85, 2), "f": (11, 98), "n": (13, 68), "q": (2.15, 8.85, 2),
                       "g": (11, 98)}, (
        "{person} rents a bike for {m} hours at {p} dollars an hour plus a fee of {f} dollars, {person2} for {n} hours "
        "at {q} dollars an hour plus a fee of {g} dollars. By how many dollars do their costs differ?",
        "One printer asks {f} dollars plus {p} dollars a copy for {m} copies, another {g} dollars plus {q} dollars a "
        "copy for {n} copies. What is the difference in dollars?",
    ), ("multiply m p -> the first price", "add #1 f -> the first total", "multiply n q -> the second price",
        "add #3 g -> the second total", "subtract #2 #4 -> the difference",
        "abs_value #5 -> the size of the difference")),
)
# fmt: on

CHAINED = _THREE_CALLS + _FOUR_CALLS + _FIVE_CALLS + _SIX_CALLS
