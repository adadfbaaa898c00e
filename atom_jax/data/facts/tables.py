"""The kinds and wordings of facts that models are trained to keep: none that the evaluation asks for
(`evaluation.tasks.planted`, `needle`), which tests/data/test_facts.py checks word by word."""

from __future__ import annotations

from atom_jax.data.facts import things
from atom_jax.data.facts.kinds import Codes, Kind, Numbers, Wording, Words

_ABOUT_PEOPLE = {
    "badge": (
        (
            Wording(" The badge worn by {s} bears the digits {a}.",
                    " Which digits does the badge of {s} bear? It bears the digits"),
            Wording(" On the payroll {s} is entered under {a}.",
                    " Under what is {s} entered on the payroll? Under"),
            Wording(" {s} signed in as visitor {a} that morning.",
                    " As which visitor did {s} sign in that morning? As visitor"),
        ), Numbers(5),
    ),
    "telephone": (
        (
            Wording(" {s} can be reached by telephone at {a}.", " At which telephone can {s} be reached? At"),
            Wording(" Phone for {s}: {a}.", " Which phone has {s}? Phone:"),
        ), Codes("000-0000"),
    ),
    "room": (
        (
            Wording(" The porter took the trunks of {s} to room {a}.",
                    " To which room did the porter take the trunks of {s}? To room"),
            Wording(" {s} had been given ward {a}, far from the stairs.",
                    " Which ward had {s} been given? Far from the stairs, ward"),
        ), Numbers(3),
    ),
    "parcel": (
        (
            Wording(" The parcel for {s} travels under the reference {a}.",
                    " Under which reference does the parcel for {s} travel? Under the reference"),
            Wording(" Somebody had stamped {a} on the crate of {s}.",
                    " What had somebody stamped on the crate of {s}? Somebody had stamped"),
        ), Codes("AA-00000"),
    ),
    "plates": (
        (
            Wording(" {s} drove away in a van with the plates {a}.", " With which plates was the van of {s}? With"),
            Wording(" The motorcycle of {s} is registered as {a}.",
                    " As what is the motorcycle of {s} registered? As"),
        ), Codes("AAA 000"),
    ),
    "origin": (
        (
            Wording(" {s} was born and raised in {a}.", " In what town was {s} born and raised? In"),
            Wording(" {s}, a native of {a}, seldom spoke of home.", " Of what town was {s} a native? Of"),
            Wording(" The money was wired to {s} in {a}.", " In what town was the money wired to {s}? In"),
        ), Words(things.TOWNS),
    ),
    "appointment": (
        (
            Wording(" {s} has an appointment at {a}.", " At what time is the appointment of {s}? At"),
            Wording(" The carriage for {s} was ordered for {a}.",
                    " For what time was the carriage for {s} ordered? For"),
        ), things.TIMES,
    ),
    "date": (
        (
            Wording(" Every year {s} gives a feast on {a}.", " On which day does {s} give a feast every year? On"),
            Wording(" The lease of {s} runs out on {a}.", " On which day does the lease of {s} run out? On"),
        ), things.DATES,
    ),
    "profession": (
        (
            Wording(" For a living {s} was the town's {a}.", " What was {s} for a living? The town's"),
            Wording(" {s} had trained for years to become a {a}.",
                    " For what had {s} trained for years? To become a"),
        ), things.PROFESSIONS,
    ),
    "language": (
        (
            Wording(" At home {s} spoke nothing but {a}.", " What did {s} speak at home? Nothing but"),
            Wording(" The diaries of {s} are in {a}.", " In which language are the diaries of {s}? In"),
        ), things.LANGUAGES,
    ),
    "instrument": (
        (
            Wording(" In the band {s} played the {a}.", " What did {s} play in the band? The"),
            Wording(" {s} sold the farm but not the {a}.", " What did {s} not sell with the farm? The"),
        ), things.INSTRUMENTS,
    ),
    "meal": (
        (
            Wording(" {s} ordered the {a}, as always.", " What did {s} order, as always? The"),
            Wording(" Nobody else would touch the {a}, but {s} had two plates.",
                    " Of what did {s} have two plates? Of the"),
        ), Words(things.MEALS),
    ),
    "coat": (
        (
            Wording(" The coat in which {s} arrived was {a}.", " Which colour had the coat of {s}? It was"),
            Wording(" {s} underlines everything in {a} ink.", " In which ink does {s} underline everything? In"),
        ), things.COATS,
    ),
    "ship": (
        (
            Wording(" {s} crossed the channel aboard the {a}.",
                    " Aboard which ship did {s} cross the channel? Aboard the"),
            Wording(" The mate of the {a} is {s}.", " Of which ship is {s} the mate? Of the"),
        ), things.SHIPS,
    ),
    "hiding place": (
        (
            Wording(' "You will find the ledger behind the {a}," {s} said.',
                    " Behind what is the ledger, as {s} said? Behind the"),
            Wording(' {s} leaned over and murmured, "Look beside the {a}."',
                    " Beside what should one look, as {s} murmured? Beside the"),
            Wording(' "Nobody has looked inside the {a} yet," remarked {s}.',
                    " Inside what has nobody looked yet, as {s} remarked? Inside the"),
        ), things.PLACES,
    ),
    "phrase": (
        (
            Wording(" To be let in, {s} has to say {a}.", " What has {s} to say to be let in? {s} has to say"),
            Wording(" The login phrase that {s} chose is {a}.", " Which login phrase did {s} choose? The phrase is"),
        ), things.PHRASES,
    ),
    "desk": (
        (
            Wording(" Since the move {s} sits at desk {a}.", " At which desk does {s} sit since the move? At desk",
                    " {s} sits at desk {b}, near the lift."),
            Wording(" As of today {s} parks in bay {a}.", " In which bay does {s} park as of today? In bay",
                    " {s} parks in bay {b}."),
        ), things.VALVES,
    ),
    "two languages": (
        (
            Wording(" {s} is fluent in {a} and {b}.", " In which two languages is {s} fluent? In",
                    answer="{a} and {b}"),
        ), things.LANGUAGES,
    ),
    "children": (
        (
            Wording(" {s} sat between the twins {a} and {b}.", " Between which twins did {s} sit? Between",
                    answer="{a} and {b}"),
        ), Words(things.CHILDREN),
    ),
    "superior": (
        (
            Wording(" The office of {m} is in {a}.",
                    " In what town is the office to which {s} reports? The office is in", " {s} reports to {m}."),
            Wording(" {m} has not left {a} for weeks.",
                    " In what town is the one who has the papers of {s}? In", " {s} gave the papers to {m}."),
        ), Words(things.TOWNS),
    ),
    "row": (
        (
            Wording("\n| {s} | {a} |\n", "\nIn the table, what stands beside {s}? Beside that name stands"),
            Wording("\n{s}: {a} points\n", "\nHow many points are noted for {s}? Noted are"),
        ), things.AMOUNTS,
    ),
}  # fmt: skip

_ABOUT_THINGS = {
    "extension": Kind(
        (
            Wording(" Calls for {s} are put through on line {a}.",
                    " On which line are calls for {s} put through? On line"),
            Wording(" Whoever wants {s} has to dial {a}.", " What has one to dial for {s}? One has to dial"),
        ), things.FIRMS, Numbers(3),
    ),
    "founding": Kind(
        (
            Wording(" {s} opened its doors in the year {a}.", " In which year did {s} open its doors? In the year"),
            Wording(" The sign above {s} read: established {a}.",
                    " Since when is {s} established, by the sign? Established"),
        ), things.FIRMS, things.YEARS,
    ),
    "account": Kind(
        (
            Wording(" Invoices for {s} are booked to account {a}.",
                    " To which account are invoices for {s} booked? To account"),
        ), things.FIRMS, Numbers(8),
    ),
    "owner": Kind(
        (
            Wording(" By the will of an aunt, {s} went to {a}.", " To whom did {s} go by the will? It went to"),
            Wording(" According to the inventory, {s} belongs to {a}.",
                    " To whom does {s} belong, according to the inventory? It belongs to"),
            Wording(' "Careful with {s}, it is mine," said {a}.', " Who said that {s} was theirs? It was"),
        ), things.OBJECTS, Words(things.PEOPLE),
    ),
    "price": Kind(
        (
            Wording(" At the auction {s} fetched {a} crowns.",
                    " How many crowns did {s} fetch at the auction? It fetched"),
            Wording(" The dealer wanted {a} guineas for {s}.",
                    " How many guineas did the dealer want for {s}? He wanted"),
        ), things.OBJECTS, things.AMOUNTS,
    ),
    "departure": Kind(
        (
            Wording(" According to the board, {s} leaves at {a}.", " When does {s} leave, by the board? At"),
            Wording(" They had missed {s}, which had gone at {a}.", " At what time had {s} gone? It had gone at"),
        ), things.TRAINS, things.TIMES,
    ),
    "distance": Kind(
        (
            Wording(" From the bridge it is {a} miles to {s}.",
                    " How many miles is it from the bridge to {s}? It is"),
            Wording(" The survey puts {s} at {a} metres above the sea.",
                    " At how many metres does the survey put {s}? At"),
        ), things.TOWNS, things.AMOUNTS,
    ),
    "recipe": Kind(
        (
            Wording(" A batch of {s} takes {a} grams of flour.",
                    " How many grams of flour does a batch of {s} take? It takes"),
            Wording(" Whoever makes {s} must have {a} millilitres of milk.",
                    " How many millilitres of milk must one have for {s}? One must have"),
        ), things.DISHES, things.AMOUNTS,
    ),
    "dose": Kind(
        (
            Wording(" Of {s}, take {a} drops at night.", " How many drops of {s} are taken at night? One takes"),
            Wording(" The leaflet allows {a} milligrams of {s} a day.",
                    " How many milligrams of {s} does the leaflet allow? It allows"),
        ), things.REMEDIES, things.DROPS,
    ),
    "store": Kind(
        (
            Wording(" The {s} are kept in row {a} of the warehouse.",
                    " In which row of the warehouse are the {s}? In row"),
            Wording(" Shelf {a} is reserved for the {s}.", " Which shelf is reserved for the {s}? Shelf"),
        ), things.GOODS, things.VALVES,
    ),
    "servicing": Kind(
        (
            Wording(" Before servicing the {s}, shut valve {a}.",
                    " Which valve is shut before servicing the {s}? Valve"),
            Wording("\n4. Replace the fuse of the {s} by type {a}.\n",
                    "\nBy which type is the fuse of the {s} replaced? By type"),
            Wording("\n- {s}: error {a} means that the filter is clogged.\n",
                    "\nWhich error of the {s} means that the filter is clogged? Error"),
        ), things.MACHINES, things.VALVES,
    ),
    "postponed": Kind(
        (
            Wording(" The {s} has been put off until {a}.",
                    " For when is the {s} set at present? It has been put off until",
                    " The {s} was announced for {b}."),
        ), things.EVENTS, things.TIMES,
    ),
    "chair": Kind(
        (
            Wording(" After the vote {a} presides over the {s} committee.",
                    " Who presides over the {s} committee after the vote? After the vote it is",
                    " {b} presides over the {s} committee."),
        ), things.COMMITTEES, Words(things.PEOPLE),
    ),
    "fare": Kind(
        (
            Wording(" From this week on the fare to {s} is {a} pence.",
                    " How many pence is the fare to {s} from this week on? It is",
                    " The fare to {s} is {b} pence."),
        ), things.TOWNS, things.AMOUNTS,
    ),
    "constant": Kind(
        (
            Wording('\nDEFAULTS["{s}"] = {a}\n', '\nassert DEFAULTS["{s}"] =='),
            Wording("\nconst {s} = {a};\n", "\nconsole.log({s});  // prints"),
            Wording("\n{s}: {a}\n", '\nconfig.get("{s}")  # returns'),
        ), things.SETTINGS, Numbers(6),
    ),
    "override": Kind(
        (
            Wording("\n{s} = {a}  # overrides the above\n", "\nprint({s})  # shows", "\n{s} = {b}\n"),
        ), things.SETTINGS, things.AMOUNTS,
    ),
    "port": Kind(
        (
            Wording(" The {s} service listens on port {a}.", " On which port does the {s} service listen? On port"),
            Wording(" Requests to the {s} service go through port {a}.",
                    " Through which port do requests to the {s} service go? Through port"),
        ), things.SERVICES, things.PORTS,
    ),
}  # fmt: skip

KINDS = {name: Kind(wordings, things.PEOPLE, answers) for name, (wordings, answers) in _ABOUT_PEOPLE.items()}
KINDS |= _ABOUT_THINGS
