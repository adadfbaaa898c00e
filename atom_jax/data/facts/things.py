"""Who and what the facts that models are trained to keep are about: no name, thing or word of the evaluation's
(`evaluation.tasks.planted`, `needle`)."""

from __future__ import annotations

from itertools import product

from atom_jax.data.facts.kinds import Words, listed

_FIRST = listed(
    "Amara, Anselm, Beatriz, Bjarne, Cecily, Conrad, Dagny, Darius, Elspeth, Emeka, Farida, Felix, Greta, Gustav,"
    " Hanna, Henrik, Imani, Isidor, Jasmin, Joachim, Katya, Kofi, Leila, Linus, Mairead, Marcel, Nadia, Niall,"
    " Odette, Oskar, Pavel, Petra, Quentin, Rosalind, Ruben, Saskia, Sven, Tamsin, Teodor, Uma, Valentin, Viola,"
    " Wanda, Wilhelm, Xenia, Yusuf, Zelda, Zoltan"
)
_LAST = listed(
    "Abara, Almeida, Banerjee, Bergmann, Castellan, Chaudhry, Dembele, Dvorak, Eklund, Engel, Fontaine, Fujita,"
    " Galloway, Grigorian, Haddad, Hollis, Ibarra, Iversen, Jankowski, Joubert, Kaplan, Kimura, Laurent, Lindqvist,"
    " MacAulay, Moreau, Nakamura, Novak, Obrecht, Okafor, Pemberton, Petrov, Quiroga, Rahman, Rasmussen, Romano,"
    " Sandoval, Sorensen, Takahashi, Thackeray, Umarov, Urquhart, Vasquez, Voss, Wexler, Whitcombe, Yamada, Yilmaz,"
    " Zeller, Zhang"
)
PEOPLE = tuple(f"{a} {b}" for a, b in product(_FIRST, _LAST))
OTHERS = tuple(
    f"{a} {b}" for a, b in product(
        listed("Inspector, Professor, Judge, Nurse, Sergeant, Deacon"),
        listed("Aldous, Brandt, Calloway, Dunmore, Everard, Fitch, Gruber, Hargreave, Ivanova, Jellicoe, Kessler,"
               " Lorimer, Munro, Niemi, Oduya, Prentice, Rostova, Selwyn, Tolliver, Vance"),
    )
)  # fmt: skip
CHILDREN = listed(
    "Agnes, Bruno, Carla, Dominic, Elsa, Flora, Gareth, Helga, Ivo, Judith, Kilian, Lydia, Magnus, Noemi, Otto,"
    " Paula, Rainer, Stella, Timon, Ulla, Victor, Wenzel, Yara, Zita"
)
FIRMS = tuple(
    f"{a} {b}" for a, b in product(
        listed("Alderney, Bancroft, Carmody, Delacroix, Ellsworth, Farnham, Gresham, Huxtable, Inverness, Jarrow,"
               " Kingsley, Lockhart, Melrose, Northgate, Osterley, Pinnacle, Redwing, Sutherland, Trafalgar,"
               " Westbrook"),
        listed("Foundry, Shipping, Textiles, Motors, Insurance, Bookshop, Laboratories, Theatre, Tea Company, Dairy"),
    )
)  # fmt: skip
TOWNS = listed(
    "Accra, Antwerp, Basel, Bilbao, Bologna, Bruges, Cardiff, Chennai, Cork, Dakar, Debrecen, Dresden, Dundee,"
    " Esbjerg, Exeter, Fremantle, Gdansk, Ghent, Granada, Hamburg, Hanoi, Hobart, Innsbruck, Izmir, Jakarta,"
    " Kampala, Kaunas, Lahore, Leipzig, Limerick, Lyon, Malaga, Manila, Medellin, Mombasa, Nantes, Naples, Odense,"
    " Osaka, Ostrava, Perth, Plymouth, Porto, Quebec, Rabat, Rotterdam, Salzburg, Seville, Tallinn, Tampere,"
    " Trieste, Turku, Uppsala, Valencia, Verona, Wellington, Windhoek, Yokohama, Ypres, Zurich"
)
TRAINS = tuple(f"the {a} to {b}" for a, b in product(listed("night train, express, mail coach, ferry"), TOWNS))
OBJECTS = tuple(
    f"the {a} {b}" for a, b in product(
        listed("antique, brass, carved, cracked, ebony, enamel, engraved, folding, gilded, lacquered, leather, oval,"
               " painted, striped, wicker"),
        listed("accordion, atlas, bookcase, bracelet, cabinet, chessboard, globe, hourglass, inkwell, microscope,"
               " mirror, music box, saddle, suitcase, teapot, tray, typewriter, umbrella, vase, viola"),
    )
)  # fmt: skip
GOODS = tuple(
    f"{a} {b}" for a, b in product(
        listed("sacks of, boxes of, jars of, tins of, bales of"),
        listed("barley, cinnamon, cotton, flax, ginger, hops, lentils, oats, paraffin, raisins, rope, rubber, sugar,"
               " tar, tobacco, turpentine, wax, wool"),
    )
)  # fmt: skip
MACHINES = tuple(
    f"{a} {b}{c}" for a, b, c in product(
        listed("autoclave, centrifuge, compressor, conveyor, dehumidifier, forklift, generator, incubator, kettle,"
               " projector, sprayer, sterilizer, thermostat, turbine, ventilator"),
        "BDEKR", range(2, 10),
    )
)  # fmt: skip
DISHES = listed(
    "almond cake, apple strudel, barley stew, cheese scones, cherry tart, corn bread, fig rolls, fruit loaf, ginger"
    " buns, honey wafers, lemon sponge, oat cookies, onion pie, plum dumplings, potato pancakes, raisin bread, rye"
    " crackers, spice cake, sweet pretzels, treacle pudding"
)
MEALS = listed(
    "cold lamb, fried herring, goat cheese, lentil soup, mushroom risotto, pea soup, pickled cabbage, potato salad,"
    " rice pudding, roast duck, smoked eel, stuffed peppers, tomato omelette, turnip mash, veal cutlet, baked trout"
)
REMEDIES = tuple(
    a + b for a, b in product(listed("Alth, Brev, Cerv, Dolm, Feld, Gast, Korv, Lumb, Nerv, Pulm"),
                              listed("enol, azine, idon, omex, ulin, aprim"))
)  # fmt: skip
EVENTS = tuple(
    f"{a} {b}" for a, b in product(
        listed("budget, choir, council, faculty, guild, parish, safety, shareholders', staff, trustees'"),
        listed("meeting, dinner, hearing, inspection, rehearsal, workshop"),
    )
)  # fmt: skip
COMMITTEES = listed(
    "archive, bylaws, drainage, finance, flower show, heritage, housing, library, lighting, planning, roads,"
    " school, sports, tourism, transport, welfare"
)
SETTINGS = tuple(
    f"{a}_{b}" for a, b in product(
        listed("audit, backup, batch, cache, cursor, index, login, queue, render, retry, session, socket, stream,"
               " token, upload, worker"),
        listed("budget, count, depth, interval, level, limit, offset, quota, ratio, size, timeout, weight"),
    )
)  # fmt: skip
SERVICES = tuple(
    f"{a}-{b}" for a, b in product(
        listed("billing, catalog, chat, geo, invoice, ledger, mailer, metrics, photo, search, ticket, voucher"),
        listed("api, proxy, relay, store, worker"),
    )
)  # fmt: skip

COATS = Words(listed(
    "beige, black, blue, charcoal, coral, cream, khaki, lilac, lime, magenta, maroon, mauve, navy, plum, red,"
    " russet, tan, teal, white"
))  # fmt: skip
PROFESSIONS = Words(listed(
    "beekeeper, blacksmith, cartographer, choirmaster, dentist, ferryman, gardener, geologist, hatter, jeweller,"
    " lawyer, librarian, locksmith, mason, midwife, notary, painter, pharmacist, pilot, plumber, roofer, shepherd,"
    " translator, veterinarian, weaver, welder, zoologist"
))  # fmt: skip
LANGUAGES = Words(listed(
    "Basque, Czech, Danish, Estonian, Finnish, Georgian, Greek, Hebrew, Hungarian, Icelandic, Japanese, Korean,"
    " Latvian, Maltese, Norwegian, Persian, Polish, Romanian, Swahili, Swedish, Tamil, Turkish, Urdu, Welsh, Yoruba,"
    " Zulu"
))  # fmt: skip
INSTRUMENTS = Words(listed(
    "bagpipes, banjo, bassoon, cello, clarinet, cornet, double bass, flute, harmonica, harp, lute, mandolin, oboe,"
    " piccolo, trombone, tuba, ukulele, xylophone, zither"
))  # fmt: skip
SHIPS = Words(listed(
    "Albatross, Bonaventure, Cormorant, Dauntless, Endeavour, Fortuna, Galatea, Hyperion, Iolanthe, Jacaranda,"
    " Kittiwake, Leviathan, Meridian, Nautilus, Osprey, Petrel, Resolute, Sirocco, Tempest, Undine, Valkyrie,"
    " Wanderer, Zenobia"
))  # fmt: skip
PLACES = Words(listed(
    "altar, barrel, bookshelf, coal bin, curtain, dresser, fireplace, flagpole, fountain, hedge, henhouse, linen"
    " chest, notice board, piano, rain barrel, staircase, stove, wardrobe, woodpile"
))  # fmt: skip
_PARTS = listed(
    "anchor, bamboo, cobalt, cricket, crystal, dolphin, ember, fiddle, gazelle, glacier, hazel, igloo, jasmine,"
    " kestrel, lotus, magnet, nectar, opal, parsley, quartz, raven, saffron, sapphire, topaz, tulip, umbra, vortex,"
    " willow, yarn, zephyr"
)
PHRASES = Words(tuple(f"{a}-{b}" for a, b in product(_PARTS, _PARTS) if a != b))
TIMES = Words(tuple(f"{h}:{m:02d}" for h, m in product(range(6, 23), range(0, 60, 5))))
DATES = Words(tuple(
    f"{day} {month}" for day, month in product(
        range(1, 29), listed("January, February, March, April, May, June, July, August, September, October, November,"
                             " December"))
))  # fmt: skip
YEARS = Words(tuple(map(str, range(1802, 1990))))
AMOUNTS = Words(tuple(map(str, range(110, 990))))
PORTS = Words(tuple(map(str, range(2011, 65000, 7))))
DROPS = Words(tuple(map(str, range(25, 99))))
VALVES = Words(tuple(f"{letter}{n}" for letter, n in product("CFGHJLMPQVW", range(11, 100))))
