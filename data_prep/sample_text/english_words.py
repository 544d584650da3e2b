"""Word lists of the English generator (data only)."""

_words = str.split

FEMALE_NAMES = _words(
    """
    Anna Maya Lucy Clara Sofia Ruth Nora Emma Ivy Grace Leila Hannah Rosa Elena Alice Martha Zoe Julia
    Petra Amara Ingrid Yara Mei Fatima Olga Tessa Vera Priya Dina Carmen Edith Naomi
    """
)
MALE_NAMES = _words(
    """
    Tom Omar Leo Daniel Felix Ben Victor Hugo Samuel Noah Ivan Peter Karim Oscar Jonas Raj Arthur Miguel
    Henry Stefan Kofi David Anton Mateo Lars Theo Walter Emil Marco Silas Bruno Gideon
    """
)
SURNAMES = _words(
    """
    Miller Novak Garcia Okafor Weber Larsen Rossi Tanaka Cooper Haddad Kowalski Moreau Silva Fischer
    Brandt Ortega Lindqvist Walsh Petrov Mensah Bauer Conti Dubois Eriksen Farrell Gruber Horvath Iyer
    Janssen Keller Lopez Marsh Nakamura Osei Patel Quinn Reyes Schmidt Turner Ueda Varga Whitfield Yilmaz
    Zeller
    """
)
CITIES = _words(
    """
    London Paris Lisbon Oslo Vienna Prague Cairo Lima Madrid Dublin Geneva Athens Boston Chicago Toronto
    Sydney Nairobi Mumbai Kyoto Seoul Hanoi Warsaw Krakow Bergen Porto Naples Munich Zurich Leeds Bristol
    Seville Lyon Ghent Riga Tallinn Havana Bogota Quito Accra Dakar Tunis Amman Tbilisi Izmir Odessa Turin
    Basel Utrecht
    """
)
COUNTRIES = _words(
    """
    France Norway Portugal Austria Egypt Peru Spain Ireland Switzerland Greece Canada Australia Kenya
    India Japan Korea Vietnam Poland Italy Germany Belgium Latvia Estonia Cuba Colombia Ecuador Ghana
    Senegal Tunisia Jordan Georgia Turkey
    """
)
TOWN_BEGINNINGS = _words(
    """
    Ald Bram Carl Dun East Fair Glen Hal Kings Lang Mill North Oak Pen Rose Stan Thorn Wick West Win Ash
    Black Clear Deer Elm Frost Green Hollow Iron Lake
    """
)
TOWN_ENDINGS = _words("ford ton bury wick field ham stead dale mouth bridge port well haven worth brook gate")
RIVERS = _words(
    """
    Arle Brenn Calder Dova Esk Fenn Garra Hessel Ister Juna Kell Lorne Mora Nidd Orla Pallas Rhea Sava
    """
)
ANIMALS = _words(
    """
    dog cat fox bird horse rabbit bear mouse owl goat duck turtle squirrel frog hedgehog crow lamb otter
    badger swan donkey deer beaver sparrow
    """
)
OBJECTS = _words(
    """
    book key lamp box letter map boat basket kite clock ring coat bell ladder drum mirror bicycle
    telescope violin lantern umbrella camera compass blanket kettle chair suitcase notebook puzzle whistle
    """
)
COLOURS = _words("red blue green yellow white black brown golden grey silver purple orange")
ADJECTIVES = _words(
    """
    small old new big little strange quiet bright heavy broken beautiful warm cold tiny dusty round clever
    careful curious lonely patient gentle noisy proud honest brave tired hungry famous ordinary
    """
)
FEELINGS = _words(
    """
    happy sad tired angry curious afraid proud surprised worried calm excited lonely grateful hopeful
    ashamed relieved confused
    """
)
PLACES = _words(
    """
    garden forest village market kitchen river school library harbour mountain station bakery castle beach
    farm bridge attic workshop museum valley lighthouse orchard tower cellar
    """
)
FOODS = _words(
    """
    bread soup apples cheese rice cake tea beans carrots honey fish pancakes porridge onions mushrooms
    tomatoes pears dumplings
    """
)
JOBS = _words(
    """
    teacher farmer doctor baker sailor painter engineer nurse carpenter writer musician lawyer librarian
    gardener chemist architect pilot shepherd clockmaker journalist historian
    """
)
SUBJECTS = _words(
    """
    physics history music mathematics botany chemistry law medicine astronomy geography philosophy
    economics geology linguistics
    """
)
PAST_VERBS = _words(
    """
    found lost carried opened painted hid repaired dropped cleaned borrowed sold bought watched washed
    wrapped kept showed broke followed
    """
)
SPECIES_GROUPS = _words(
    """
    beetle orchid frog finch moth fern lizard mushroom snail perch oak thistle bat crab heron butterfly
    shrew moss
    """
)
LATIN_BEGINNINGS = _words(
    """
    Acro Brachy Calo Chloro Dendro Erythro Glauco Hylo Lepto Macro Melano Micro Oxy Phyllo Platy Rhodo
    Steno Tricho Xantho
    """
)
LATIN_ENDINGS = _words("phora stoma cera ptera soma thrix desmus nema gaster cephala spora carpus")
LATIN_EPITHETS = _words(
    """
    vulgaris montana borealis minor gracilis palustris alba nigra elegans maritima sylvatica robusta rubra
    communis arvensis pallida
    """
)
MATERIALS = _words("copper iron glass paper wool cotton salt timber coal silk sugar leather steel marble")
SEASONS = _words("spring summer autumn winter")
MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBER_WORDS = _words("two three four five six seven eight nine ten eleven twelve")
PRODUCTS = _words(
    """
    kettle headphones backpack lamp keyboard jacket tent blender watch mattress bicycle coffee camera
    suitcase desk printer
    """
)
