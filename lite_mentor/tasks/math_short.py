"""Word problems of one and two calls. A template is a block: numbers, wordings, solution, words."""

from __future__ import annotations

from lite_mentor.tasks.templates import Template

# fmt: off
GOODS = ("pencils", "notebooks", "screws", "candles", "bottles", "tiles", "postcards", "buttons", "lamps", "mugs")
FIELDS = ("field", "garden", "car park", "courtyard", "playground", "meadow")

_ONE_CALL = (
    Template("seats", {"rows": (112, 480), "seats": (23, 98)}, (
        "A {hall} has {rows} rows with {seats} seats in each row. How many seats does it have in total?",
        "Every one of the {rows} rows in a {hall} has {seats} seats. What is the total number of seats?",
        "{person} counts {rows} rows of {seats} seats in a {hall}. How many seats are there?",
    ), ("multiply rows seats -> the number of seats",), {"hall": ("theatre", "stadium", "concert hall", "cinema")}),
    Template("wages", {"hours": (27, 168), "rate": (11.15, 48.95, 2)}, (
        "{person} works {hours} hours and earns {rate} dollars an hour. How many dollars does {person} earn?",
        "At {rate} dollars an hour, how many dollars does {person} get for {hours} hours of work?",
    ), ("multiply hours rate -> the earnings",)),
    Template("area", {"length": (41.3, 98.7, 1), "width": (12.3, 40.9, 1)}, (
        "A rectangular {field} is {length} metres long and {width} metres wide. What is its area in square metres?",
        "What is the area, in square metres, of a {field} that measures {length} metres by {width} metres?",
    ), ("multiply length width -> the area",), {"field": FIELDS}),
    Template("visitors", {"first": (1204, 9876), "second": (1204, 9876)}, (
        "{first} people visited a {place} on Saturday and {second} on Sunday. How many people came that weekend?",
        "A {place} had {first} visitors in May and {second} visitors in June. How many visitors is that together?",
    ), ("add first second -> the number of visitors",), {"place": ("museum", "zoo", "castle", "fair", "library")}),
    Template("parcels", {"first": (12.15, 98.85, 2), "second": (12.15, 98.85, 2)}, (
        "One parcel weighs {first} kilograms and another weighs {second} kilograms. What do they weigh together?",
        "{person} carries a parcel of {first} kilograms and {person2} one of {second} kilograms. "
        "How many kilograms is that in total?",
    ), ("add first second -> the total weight",)),
    Template("stock", {"total": (4213, 9876), "sold": (1021, 4187)}, (
        "A warehouse stores {total} {goods} and ships {sold} of them. How many {goods} are left?",
        "Of {total} {goods} in a shop, {sold} have been sold. How many remain?",
    ), ("subtract total sold -> the number that is left",), {"goods": GOODS}),
    Template("change", {"paid": (60, 150), "price": (21.15, 59.85, 2)}, (
        "{person} pays a bill of {price} dollars with {paid} dollars. How many dollars of change does {person} get?",
        "A jacket costs {price} dollars. {person} hands over {paid} dollars. How much change is due, in dollars?",
    ), ("subtract paid price -> the change",)),
    Template("share", {"each": (34, 289), "groups": (17, 96), "total": lambda n: n["each"] * n["groups"]}, (
        "{total} {goods} are shared equally among {groups} schools. How many does each school get?",
        "{person} packs {total} {goods} into {groups} crates, the same number in each. "
        "How many {goods} are in one crate?",
    ), ("divide total groups -> the share of each",), {"goods": GOODS}),
    Template("speed", {"speed": (43, 118), "hours": (2.3, 9.9, 1),
                       "way": lambda n: round(n["speed"] * n["hours"], 1)}, (
        "A {vehicle} covers {way} kilometres in {hours} hours. What is its average speed in kilometres per hour?",
        "{person} travels {way} kilometres by {vehicle} in {hours} hours. How many kilometres per hour is that?",
    ), ("divide way hours -> the speed",), {"vehicle": ("bus", "train", "car", "truck")}),
    Template("week_sales", dict.fromkeys("abcde", (112, 989)), (
        "From Monday to Friday a shop sold {a}, {b}, {c}, {d} and {e} {goods}. How many {goods} did it sell in all?",
        "{person} counts {goods} in five boxes: {a}, {b}, {c}, {d} and {e}. How many {goods} are there altogether?",
    ), ("sum_numbers a b c d e -> the total",), {"goods": GOODS}),
    Template("receipts", dict.fromkeys("abcd", (11.15, 98.85, 2)), (
        "{person} has four receipts of {a}, {b}, {c} and {d} dollars. How many dollars do they add up to?",
        "What is the sum of the invoices {a}, {b}, {c} and {d} dollars?",
    ), ("sum_numbers a b c d -> the sum",)),
    Template("whole_litres", {"amount": (1012.15, 9876.85, 2)}, (
        "A tank holds {amount} litres. Rounded down, how many whole litres is that?",
        "{person} measures {amount} {unit} and notes only the whole {unit}, rounding down. Which number is noted?",
    ), ("floor amount -> the whole part",), {"unit": ("litres", "metres", "grams", "seconds")}),
    Template("started_minutes", {"time": (1012.15, 9876.85, 2)}, (
        "A call lasts {time} minutes and every started minute is charged. How many minutes are charged?",
        "A job takes {time} {unit}. Rounded up to whole {unit}, how long does it take?",
    ), ("ceil time -> the rounded time",), {"unit": ("minutes", "hours", "seconds")}),
    Template("rounding", {"value": (12.0113, 987.9887, 4), "digits": [2, 3]}, (
        "A sensor reports {value} {unit}. What is that rounded to {digits} decimals?",
        "Round {value} {unit} to {digits} decimals.",
        "{person} has to write {value} {unit} with {digits} decimals. Which number is it after rounding?",
    ), ("round_number value digits -> the rounded value",), {"unit": ("volts", "kilograms", "metres", "degrees")}),
    Template("codes", {"symbols": (6, 29), "wheels": (3, 5)}, (
        "A lock has {wheels} wheels with {symbols} symbols each. How many different codes are possible?",
        "A password has {wheels} places, and each place has {symbols} possible letters. How many passwords are there?",
    ), ("power symbols wheels -> the number of possibilities",)),
    Template("cube", {"side": (1.3, 98.7, 1)}, (
        "A cube has edges of {side} centimetres. What is its volume in cubic centimetres?",
        "What is the volume of a cube whose edge is {side} metres long, in cubic metres?",
    ), ("power side 3 -> the volume",)),
    Template("square_side", {"side": (43, 989), "area": lambda n: n["side"] ** 2}, (
        "A square {field} has an area of {area} square metres. How long is one side, in metres?",
        "How many metres long is the side of a square {field} of {area} square metres?",
    ), ("sqrt area -> the side",), {"field": FIELDS}),
    Template("depth", {"depth": (-989.9, -12.1, 1)}, (
        "A diver's height relative to the sea is {depth} metres. How many metres is that away from the surface?",
        "An account shows {depth} dollars. What is the absolute value of this amount, in dollars?",
    ), ("abs_value depth -> the distance from zero",)),
    Template("left_over", {"total": (1203, 9876), "size": (13, 89)}, (
        "{total} {goods} are packed in boxes of {size}. How many {goods} are left over?",
        "{person} puts {total} {goods} into bags of {size} each until no full bag can be made. How many are left?",
    ), ("modulo total size -> what is left over",), {"goods": GOODS}),
    Template("cycle", {"time": (1203, 9876), "period": (37, 143)}, (
        "A traffic light repeats every {period} seconds. How many seconds into its cycle is it after {time} seconds?",
        "A song of {period} seconds plays on a loop. After {time} seconds, how many seconds of it have played "
        "since it last started?",
    ), ("modulo time period -> the time since the last start",)),
)

_TWO_CALLS = (
    Template("delivery", {"count": (23, 98), "price": (12.15, 48.85, 2), "fee": (6.15, 19.85, 2)}, (
        "{person} orders {count} {goods} at {price} dollars each, plus {fee} dollars for delivery. "
        "What is the total in dollars?",
        "A school buys {count} {goods} for {price} dollars each and pays {fee} dollars for shipping. "
        "How many dollars does it pay in all?",
    ), ("multiply count price -> the price of the {goods}", "add #1 fee -> the total"), {"goods": GOODS}),
    Template("budget", {"count": (17, 68), "price": (11.15, 28.85, 2), "budget": (1950, 4200)}, (
        "{person} has {budget} dollars and buys {count} {goods} for {price} dollars each. How many dollars are left?",
        "From a budget of {budget} dollars, a club pays for {count} {goods} at {price} dollars each. "
        "How much of the budget remains, in dollars?",
    ), ("multiply count price -> the cost of the {goods}", "subtract budget #1 -> what is left"), {"goods": GOODS}),
    Template("average", dict.fromkeys("abcd", (1112, 9889)), (
        "Four {things} have {a}, {b}, {c} and {d} inhabitants. How many inhabitants do they have on average?",
        "The populations of four {things} are {a}, {b}, {c} and {d}. What is the mean?",
    ), ("sum_numbers a b c d -> the sum", "divide #1 4 -> the average"), {"things": ("villages", "towns", "islands")}),
    Template("boxes_needed", {"total": (2213, 9876), "size": (13, 89)}, (
        "{person} packs {total} {goods} into boxes that hold {size} each. How many boxes are needed for all of them?",
        "A box holds {size} {goods}. What is the smallest number of boxes that can hold {total} {goods}?",
    ), ("divide total size -> the number of boxes", "ceil #1 -> the number of whole boxes"), {"goods": GOODS}),
    Template("full_boxes", {"total": (2213, 9876), "size": (13, 89)}, (
        "{total} {goods} are put into boxes of {size}. How many boxes can be filled completely?",
        "How many full packs of {size} can {person} make from {total} {goods}?",
    ), ("divide total size -> the number of packs", "floor #1 -> the number of full packs"), {"goods": GOODS}),
    Template("unit_price", {"total": (312.15, 987.85, 2), "count": (17, 96)}, (
        "{count} {goods} cost {total} dollars. What does one cost, rounded to 2 decimals?",
        "{person} paid {total} dollars for {count} {goods}. How many dollars is that per piece, rounded to 2 decimals?",
    ), ("divide total count -> the price of one", "round_number #1 2 -> the rounded price"), {"goods": GOODS}),
    Template("square_side_rounded", {"area": (1213, 9887)}, (
        "A square {field} covers {area} square metres. How long is its side in metres, rounded to 2 decimals?",
        "Find the side of a square {field} with an area of {area} square metres, rounded to 2 decimals.",
    ), ("sqrt area -> the side", "round_number #1 2 -> the rounded side"), {"field": FIELDS}),
    Template("temperatures", {"first": (-49.9, -2.1, 1), "second": (2.1, 49.9, 1)}, (
        "One probe shows {first} degrees and another {second} degrees. By how many degrees do they differ?",
        "The temperature was {first} degrees in the morning and {second} degrees at noon. "
        "What is the absolute difference in degrees?",
    ), ("subtract first second -> the difference", "abs_value #1 -> the size of the difference")),
    Template("necklaces", {"total": (2213, 9876), "lost": (113, 989), "size": (17, 89)}, (
        "{person} has {total} beads and gives {lost} away. The rest go on strings of {size} beads. "
        "How many beads are left over?",
        "Of {total} beads, {lost} are broken. {person} makes chains of {size} from the others. "
        "How many beads remain unused?",
    ), ("subtract total lost -> the number of usable beads", "modulo #1 size -> the number left over")),
    Template("growth", {"start": (17, 95), "factor": (3, 6), "hours": (4, 6)}, (
        "A colony of {start} cells becomes {factor} times as large every hour. How many cells are there after "
        "{hours} hours?",
        "The number of {animals} on an island, now {start}, is multiplied by {factor} every year. "
        "What is it after {hours} years?",
    ), ("power factor hours -> the growth factor", "multiply start #1 -> the final number"),
        {"animals": ("snails", "fish", "rabbits", "beetles")}),
    Template("perimeter", {"side": (43, 989), "area": lambda n: n["side"] ** 2}, (
        "A square {field} has an area of {area} square metres. How many metres of fence go around it?",
        "What is the perimeter, in metres, of a square {field} of {area} square metres?",
    ), ("sqrt area -> the side", "multiply #1 4 -> the perimeter"), {"field": FIELDS}),
    Template("two_legs", {"speed": (43, 118), "hours": (6, 14), "first": (112, 247),
                          "second": lambda n: n["speed"] * n["hours"] - n["first"]}, (
        "A {vehicle} drives {first} kilometres, rests, and drives another {second} kilometres. It drives for {hours} "
        "hours in all. What is its average speed in kilometres per hour?",
        "{person} covers {first} kilometres and then {second} kilometres in {hours} hours of driving. "
        "How many kilometres per hour is that on average?",
    ), ("add first second -> the distance", "divide #1 hours -> the speed"), {"vehicle": ("bus", "van", "truck")},
        lambda n: n["second"] > 20),
    Template("coupon", {"price": (121.15, 398.85, 2), "coupon": (12.15, 48.85, 2), "count": (13, 38)}, (
        "A {device} costs {price} dollars, and a coupon takes {coupon} dollars off each one. "
        "What do {count} of them cost, in dollars?",
        "{person} buys {count} {device}s. Each costs {price} dollars less a discount of {coupon} dollars. "
        "How many dollars does {person} pay?",
    ), ("subtract price coupon -> the reduced price", "multiply #1 count -> the total price"),
        {"device": ("printer", "camera", "drill", "radio")}),
    Template("cuboid", {"a": (12.3, 38.9, 1), "b": (12.3, 38.9, 1), "c": (13, 48)}, (
        "A {box} is {a} centimetres long, {b} centimetres wide and {c} centimetres high. "
        "What is its volume in cubic centimetres?",
        "What is the volume of a {box} that measures {a} by {b} by {c} centimetres, in cubic centimetres?",
    ), ("multiply a b -> the base area", "multiply #1 c -> the volume"), {"box": ("box", "crate", "chest", "tank")}),
    Template("percent", {"total": (1213, 9876), "percent": (11, 89)}, (
        "{percent} percent of the {total} dollars raised by a charity go to {cause}. How many dollars is that?",
        "A town spends {percent} percent of a fund of {total} dollars on {cause}. How many dollars does it spend?",
    ), ("multiply total percent -> the total times the percentage", "divide #1 100 -> the share"),
        {"cause": ("schools", "roads", "parks", "hospitals")}),
    Template("flour", {"stock": (4213, 9876), "a": (312, 989), "b": (312, 989), "c": (312, 989)}, (
        "A bakery has {stock} grams of flour. It uses {a}, {b} and {c} grams for three cakes. How many grams are left?",
        "{person} starts with {stock} points and loses {a}, {b} and {c} points. How many points remain?",
    ), ("sum_numbers a b c -> the amount used up", "subtract stock #1 -> what is left")),
    Template("trays", {"trays": (23, 98), "each": (24, 96), "size": (7, 19)}, (
        "A baker fills {trays} trays with {each} rolls each and then packs them in bags of {size}. "
        "How many rolls are left over?",
        "{trays} crates hold {each} apples each. The apples are put in nets of {size}. How many apples remain?",
    ), ("multiply trays each -> the total number", "modulo #1 size -> the number left over")),
    Template("exchange", {"amount": (213, 987), "rate": (1.0213, 9.8887, 4)}, (
        "{person} changes {amount} dollars at {rate} crowns per dollar. The desk pays only whole crowns, rounded down. "
        "How many crowns does {person} get?",
        "One ounce of a metal costs {rate} dollars. How many whole dollars, rounded down, are {amount} ounces worth?",
    ), ("multiply amount rate -> the value", "floor #1 -> the whole part")),
    Template("fuel", {"way": (213.1, 987.9, 1), "use": (0.053, 0.189, 3)}, (
        "A car uses {use} litres per kilometre. How many litres does it need for {way} kilometres, "
        "rounded to 1 decimal?",
        "{person} drives {way} kilometres with a van that burns {use} litres per kilometre. "
        "How many litres is that, rounded to 1 decimal?",
    ), ("multiply way use -> the fuel used", "round_number #1 1 -> the rounded amount")),
)
# fmt: on

SHORT = _ONE_CALL + _TWO_CALLS
