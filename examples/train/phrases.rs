//! The words of the tales, all written for this crate. `{key}` stands for a word that is drawn once per tale, `{Key}`
//! for the same with a capital, `{a key}` for the same with its article, and `[x|y]` for one of several wordings.

/// How a tale begins.
pub const OPENINGS: &[&str] = &[
    "Once upon a time, there was {a kind} named {hero}.",
    "Once upon a time, there was {a kind} named {hero}.",
    "Once upon a time, {a kind} named {hero} lived {home}.",
    "Once upon a time, {a kind} called {hero} lived {home}.",
    "Once, {home}, there lived {a kind} named {hero}.",
    "Long ago, {a kind} called {hero} lived {home}.",
    "There was once {a kind} who was called {hero}.",
    "{Hero} was {a kind} who lived {home}.",
];

/// What the hero is like; often left out.
pub const TRAITS: &[&str] = &[
    "{He} was [kind|clever|curious|brave|cheerful|quiet|busy] and {he} loved to {hobby}.",
    "{He} was always [happy|busy|full of questions|ready to play].",
    "More than anything, {he} loved to {hobby}.",
    "{He} liked to {hobby}, and {he} liked {foods} even more.",
    "Everyone knew {hero}, because {he} was so [kind|cheerful|friendly|curious].",
    "{He} lived with {his} {parent} and had a good friend, {friend}.",
    "",
    "",
];

/// What the weather is, told by its number in [`WEATHERS`].
pub const WEATHERS: &[(&str, &[&str])] = &[
    ("sunny", &["The sun was warm and the sky was blue.", "The sun shone on every leaf.", "", ""]),
    ("windy", &["The wind danced in the trees.", "The wind blew the leaves around and around.", "", ""]),
    ("cloudy", &["Soft grey clouds hung over the hills.", "The sky was grey, but the air was warm.", "", ""]),
    ("misty", &["The mist lay on the grass like a white blanket.", "It was hard to see very far.", "", ""]),
    ("warm", &["The bees were busy in the flowers.", "The air smelled of flowers and cut grass.", "", ""]),
    ("cool", &["The grass was still wet and cold.", "The air was fresh and clean.", "", ""]),
];

/// The last words.
pub const ENDINGS: &[&str] = &[
    "[From that day on|After that day], {hero} and {friend} were the best of friends.",
    "That night, {hero} [slept very well|went to bed with a smile|dreamed happy dreams].",
    "{Hero} [went home|walked home|ran home] with a [big smile|happy heart|warm feeling inside].",
    "And {his} {parent} was very proud of {him}.",
    "It was the best day of the whole [week|year|summer].",
    "{Hero} never forgot that day.",
    "",
    "",
    "",
];

/// A story: its sentences in order, each in several wordings.
pub type Arc = &'static [&'static [&'static str]];

/// All stories. The last sentence of each is its lesson.
pub const ARCS: &[Arc] = &[
    // A lost toy.
    &[
        &["{Day}, {hero} took {his} {thing} {to}.", "{Day}, {hero} went {to} to play with {his} {thing}."],
        &["{weather}"],
        &[
            "{He} played all day, but when it was time to go home, the {toy} was gone.",
            "{He} put the {toy} down to chase a butterfly. When {he} came back, it was not there.",
            "Then {he} saw {a animal} and ran after it. When {he} looked around, the {toy} was gone.",
        ],
        &["{Hero} was very sad and began to cry.", "\"Oh no! Where is my {toy}?\" cried {hero}.", "{Hero} felt sad."],
        &[
            "{His} friend {friend} came by and asked, \"Why are you [sad|crying|so sad]?\"",
            "{Friend} heard {him} and came to help. \"What is wrong?\" {fhe} asked.",
        ],
        &["\"I lost my {toy},\" said {hero}. \"I can not find it.\"", "\"My {toy} is gone,\" {hero} said."],
        &["\"Let us look for it together,\" said {friend}.", "\"Do not worry. I will help you look,\" said {friend}."],
        &["They looked {spot2}, but it was not there.", "First they looked {spot2}. There was nothing.", ""],
        &["Then they looked {spot}, and there was the {thing}!", "At last, {friend} found the {toy} {spot}."],
        &[
            "\"Thank you!\" said {hero}, and {he} [hugged|thanked] {friend}.",
            "{Hero} jumped with joy and hugged {friend}.",
        ],
        &[
            "{Hero} learned that it is good to ask for help.",
            "{Hero} learned to take good care of {his} things.",
            "{Hero} knew then that a good friend is worth more than any {toy}.",
        ],
    ],
    // A fear of the dark.
    &[
        &["{Hero} was not afraid of dogs or of deep water, but {he} was afraid of the dark."],
        &["One night, the lamp went out and the room was black.", "One night, the wind blew out {his} candle."],
        &["{He} saw a big shape by the [window|door].", "Something tall stood in the corner and did not move."],
        &["{Hero} pulled the blanket over {his} head.", "{His} heart went thump, thump, thump."],
        &["\"Help!\" {he} called. \"There is a monster in my room!\"", "{He} called for {his} {parent}."],
        &["{His} {parent} came in with a small light. \"Let us look at it together,\" {phe} said."],
        &["The shape was only {his} coat on a chair!", "It was only {his} {thing} on top of the [shelf|chair]."],
        &["{Hero} began to laugh.", "They both laughed and laughed.", "\"How silly!\" said {hero}."],
        &["After that, {he} was not afraid any more.", "The next night, {he} said good night to the dark."],
        &[
            "{He} learned that many scary things are not scary when you look at them.",
            "{He} learned that it is brave to say that you are afraid.",
        ],
    ],
    // Two friends and one toy.
    &[
        &["{Day}, {hero} got {a thing} from {his} {parent}.", "{Day}, {hero} found {a thing} {at}."],
        &["{His} friend {friend} came and said, \"May I play with it too?\"", "{Friend} wanted to play with it too."],
        &[
            "\"No! It is mine,\" said {hero}, and {he} held it tight.",
            "But {hero} did not want to share. \"Go away!\" {he} said.",
        ],
        &["{Friend} was [sad|hurt] and walked away.", "{Friend} looked at the ground and went home."],
        &["{Hero} played alone, but it was not fun.", "Now {hero} had the {toy}, but {he} had nobody to play with."],
        &["{He} thought about it for a long time.", "{His} {parent} said, \"A {toy} is more fun with a friend.\"", ""],
        &[
            "So {he} ran after {friend} and said, \"I am sorry. Let us play together.\"",
            "{He} went to find {friend}. \"I am sorry,\" {he} said. \"You can have a turn.\"",
        ],
        &["{Friend} smiled and {fhe} forgave {him}.", "\"Thank you,\" said {friend}, and {fhe} smiled."],
        &["They played with the {thing} until the sun went down.", "They took turns, and it was much more fun."],
        &["{Hero} learned that sharing makes every toy better.", "{Hero} learned that it is more fun to share."],
    ],
    // A hurt animal.
    &[
        &[
            "{Day}, {hero} was walking {at} when {he} heard a [soft|small|strange] sound.",
            "{Day}, {hero} went {to}. On the way, {he} heard someone crying.",
        ],
        &["{weather}"],
        &[
            "It was {a animal}. It had hurt its leg and could not walk.",
            "There, {spot}, sat {a animal}. Its leg was hurt.",
        ],
        &[
            "\"Poor little {beast},\" said {hero}. \"Do not be afraid.\"",
            "{Hero} sat down beside it. \"I will help you,\" {he} said softly.",
        ],
        &["{He} picked it up and carried it home.", "Very gently, {he} took the {beast} home to {his} {parent}."],
        &[
            "{His} {parent} put a [clean cloth|soft bandage] around the leg.",
            "{He} gave it some water and made it a warm bed of straw.",
        ],
        &["Every day, {hero} fed the {beast} and talked to it.", "{Hero} took care of it for many days."],
        &["At last, the leg was strong again.", "Soon the {beast} could run again."],
        &[
            "{Hero} opened the door and let it go. {He} was sad and happy at the same time.",
            "\"Now you can go home,\" said {hero}. {He} felt a little sad.",
        ],
        &[
            "But the next morning, the {beast} came back to say hello!",
            "And from then on, the {beast} came to see {him} every week.",
        ],
        &[
            "{Hero} learned that kindness always comes back.",
            "{Hero} learned that even a small act of kindness can make a friend.",
        ],
    ],
    // Something is broken, and the truth is told.
    &[
        &[
            "{Day}, {hero} was playing with {his} {thing} in the house.",
            "{Day}, it rained, so {hero} played inside with {his} {thing}.",
        ],
        &[
            "{His} {parent} had said, \"Please be careful in here.\"",
            "\"Do not run in the house,\" said {his} {parent}.",
            "",
        ],
        &[
            "But {he} ran too fast, and crash! The {vase} fell and broke.",
            "{He} turned around too fast and hit the {vase}. It fell down and broke.",
        ],
        &[
            "{Hero} was afraid. {He} hid the pieces [behind the sofa|under the rug|in a box].",
            "\"Oh no,\" {he} whispered. {He} wanted to hide.",
        ],
        &[
            "When {his} {parent} came home, {phe} asked, \"Where is my {vase}?\"",
            "Soon {his} {parent} saw that the {vase} was gone. \"Who did this?\" {phe} asked.",
        ],
        &[
            "{Hero} wanted to say that the cat did it, but that was not true.",
            "{Hero} looked at {his} feet. {His} face was hot.",
        ],
        &[
            "\"It was me,\" {he} said. \"I broke it. I am very sorry.\"",
            "\"I did it,\" said {hero}, and a tear ran down {his} face.",
        ],
        &[
            "{His} {parent} was quiet for a moment. Then {phe} hugged {him}.",
            "{His} {parent} was not angry. \"Thank you for telling me the truth,\" {phe} said.",
        ],
        &[
            "They picked up the pieces together and fixed the {vase} with glue.",
            "Together they cleaned the floor, and {hero} promised to be more careful.",
        ],
        &[
            "{Hero} learned that it is always best to tell the truth.",
            "{Hero} learned that the truth is hard to say, but it makes you feel light.",
        ],
    ],
    // Baking that fails and then works.
    &[
        &[
            "{Day}, {hero} wanted to bake {foods} for {his} {parent}.",
            "{Day}, {hero} said, \"I will make {foods} all by myself!\"",
        ],
        &[
            "{He} mixed the flour, the milk and the eggs in a big bowl.",
            "{He} put flour and sugar in a bowl and stirred and stirred.",
        ],
        &[
            "But {he} [forgot the sugar|used salt and not sugar|forgot to look at the clock].",
            "But {he} left them in the oven for too long.",
        ],
        &[
            "The {foods} were black and hard as stones.",
            "The {foods} tasted so bad that even the {beast} would not eat them.",
        ],
        &[
            "{Hero} was [sad|upset]. \"I will never bake again,\" {he} said.",
            "\"I can not do anything right!\" cried {hero}.",
        ],
        &[
            "{Friend} came in and said, \"Nobody can do it the first time. Try again!\"",
            "\"Let us try one more time,\" said {his} friend {friend}. \"I will help you.\"",
        ],
        &[
            "So {he} tried again, and this time {he} was [slow|careful].",
            "They started again, step by step, and read every word of the recipe.",
        ],
        &["Soon the house smelled [sweet|warm and sweet|wonderful].", "This time, the {foods} were soft and golden."],
        &[
            "{His} {parent} took a bite and said, \"These are the best {foods} in the world!\"",
            "{His} {parent} ate three of them and asked for more.",
        ],
        &[
            "{Hero} learned that you should not give up when something goes wrong.",
            "{Hero} learned that mistakes help us to learn.",
        ],
    ],
    // The wind takes something away.
    &[
        &[
            "One windy day, {hero} and {friend} went {to} to fly a kite.",
            "{Hero} and {friend} had a new kite. It was {color} with a long tail.",
        ],
        &["The wind was strong, and the kite went up, up, up.", "The kite flew higher than the trees."],
        &[
            "Then the string broke, and the kite flew away!",
            "All at once, the wind pulled the kite out of {his} {hand}.",
        ],
        &["\"Come back!\" cried {hero}. They ran after it.", "They ran and ran, but the wind was faster."],
        &["The kite got stuck at the top of a tall tree.", "At last it came down in a very tall tree."],
        &[
            "{Hero} could not climb so high.",
            "\"It is too high for me,\" said {hero}.",
            "They jumped and jumped, but they could not reach it.",
        ],
        &[
            "A [squirrel|crow|young owl] in the tree looked down. \"Is this yours?\" it asked.",
            "Just then, a [squirrel|crow] came by. \"Can I help?\" it asked.",
        ],
        &[
            "It pulled at the string until the kite fell down to the ground.",
            "It picked the kite out of the leaves and let it fall.",
        ],
        &[
            "\"Thank you so much!\" said {hero}, and {he} gave it {a food}.",
            "They shared their {foods} with it to say thank you.",
        ],
        &[
            "{Hero} learned that help can come from small friends.",
            "{Hero} learned that a kind word and a little luck can go a long way.",
        ],
    ],
    // Someone new.
    &[
        &["{Day}, a new family moved into the house next door.", "{Day}, someone new came to live near {hero}."],
        &[
            "There was {a fkind} named {friend}, who was very shy.",
            "{Hero} saw {a fkind} sitting all alone. It was {friend}.",
        ],
        &[
            "{Friend} did not talk to anyone. {FHe} only looked at {fhis} feet.",
            "When the others played, {friend} stood far away.",
        ],
        &["{Hero} wanted to be kind, but {he} did not know what to say.", "\"Maybe {fhe} is lonely,\" thought {hero}."],
        &[
            "So {he} took {his} {thing} and went over. \"Do you want to play?\" {he} asked.",
            "So {he} brought {a food} and said, \"This is for you.\"",
        ],
        &["{Friend} looked up and smiled for the first time.", "At first, {friend} said nothing. Then {fhe} smiled."],
        &[
            "\"I was afraid that nobody would like me,\" said {friend}.",
            "\"I had no friends here,\" {friend} said in a small voice.",
        ],
        &["\"I like you,\" said {hero}. \"Come with me!\"", "\"Now you have one,\" said {hero}."],
        &["They went {to} and [played|laughed|ran] all day long.", "They played {at} until it was time for dinner."],
        &[
            "{Hero} learned that a smile can be the start of a friendship.",
            "{Hero} learned that a new friend may only be waiting for a kind word.",
        ],
    ],
    // Lost in the woods.
    &[
        &[
            "{Day}, {hero} went into the woods to pick [berries|nuts|mushrooms|flowers].",
            "{Day}, {hero} walked into the big woods to look for [berries|nuts|flowers].",
        ],
        &["{His} {parent} said, \"Stay on the path.\"", "\"Do not go too far,\" said {his} {parent}."],
        &[
            "But {he} saw {a animal} and followed it, deeper and deeper.",
            "But the best ones grew far from the path, so {he} went on and on.",
        ],
        &["When {he} looked back, the path was gone.", "Soon all the trees looked the same."],
        &["It was getting dark, and {hero} was afraid.", "\"I am lost,\" {he} said, and {his} voice was very small."],
        &[
            "Then an old [owl|turtle|deer] said, \"Why are you here so late, little one?\"",
            "Two big eyes looked at {him}. It was an old [owl|badger].",
        ],
        &[
            "\"I left the path, and now I can not find my way home,\" said {hero}.",
            "\"Please, can you show me the way home?\" asked {hero}.",
        ],
        &[
            "\"Follow the little stream,\" it said. \"It will take you home.\"",
            "\"Follow me,\" it said, and it led {him} from tree to tree.",
        ],
        &["Soon {he} saw the light of {his} own window.", "At last, {hero} saw the roof of {his} house."],
        &[
            "{His} {parent} hugged {him} for a long time.",
            "{His} {parent} ran out and held {him} tight. \"I was so worried!\" {phe} said.",
        ],
        &["{Hero} learned to listen to {his} {parent}.", "After that, {hero} always stayed on the path."],
    ],
    // A seed and patience.
    &[
        &["{Day}, {his} {parent} gave {hero} a tiny seed.", "{Day}, {hero} found a small brown seed {at}."],
        &[
            "{He} put it in the ground and gave it some water.",
            "{Hero} dug a little hole, put the seed inside and covered it with soil.",
        ],
        &[
            "The next day, {he} looked, but there was nothing.",
            "Every morning {he} ran outside to look, but nothing grew.",
        ],
        &["\"Why does it not grow?\" {he} asked.", "\"This seed is no good,\" said {hero}. {He} wanted to dig it up."],
        &[
            "\"You must wait,\" said {his} {parent}. \"Good things take time.\"",
            "{Friend} said, \"Seeds are slow. Give it water and wait.\"",
        ],
        &["So {hero} waited. {He} gave it water when it was dry.", "{Hero} waited through rain and through sun."],
        &[
            "Then, one morning, a small green leaf came up!",
            "After many days, a tiny green leaf looked out of the ground.",
        ],
        &[
            "It grew and grew until it was taller than {hero}.",
            "Week after week, it grew, and at last it had a big yellow flower.",
        ],
        &[
            "Bees came, and birds came, and everyone said how beautiful it was.",
            "{Hero} danced around it and called everyone to come and see.",
        ],
        &["{Hero} learned to be patient.", "{Hero} learned that good things need time and care."],
    ],
    // A race.
    &[
        &["{Day}, there was a race {at}.", "{Day}, everyone came {to} for the big race."],
        &[
            "{Hero} was very fast and wanted to win the prize, {a thing}.",
            "The prize was {a thing}, and {hero} wanted it very much.",
        ],
        &["\"One, two, three, go!\" They all began to run.", "A bell rang, and off they went."],
        &["{Hero} was in front of all the others.", "Soon {hero} was the first, and {friend} was right behind {him}."],
        &[
            "Then {he} heard a cry. {Friend} had fallen down and hurt {fhis} knee.",
            "Then {friend} fell over a stone and could not get up.",
        ],
        &["{Hero} looked at the finish and then at {his} friend.", "{Hero} was so close to the end! But {he} stopped."],
        &["{He} turned around and helped {friend} to stand up.", "{He} ran back. \"Hold on to me,\" {he} said."],
        &[
            "They walked to the end together, and they were the last.",
            "Together they went over the line, slowly, step by step.",
        ],
        &[
            "But everyone clapped for them, and they got the {toy} as a prize for kindness.",
            "Someone else got the prize, but {friend} said, \"You are the best friend of all.\"",
        ],
        &[
            "{Hero} learned that a friend is more important than a prize.",
            "{Hero} learned that winning is not everything.",
        ],
    ],
    // A noise at night.
    &[
        &[
            "One night, {hero} woke up. There was a noise [outside the window|in the kitchen|on the roof].",
            "It was late at night, and {hero} could not sleep. Scratch, scratch! went something outside.",
        ],
        &["{He} thought it was a [ghost|monster|thief].", "\"Who is there?\" {he} whispered. Nobody answered."],
        &[
            "{He} took {his} lamp and tiptoed to the door.",
            "{He} was scared, but {he} wanted to know, so {he} got out of bed.",
        ],
        &["Slowly, {he} opened the door.", "{He} opened the door just a little bit."],
        &["It was only {a animal}, wet and cold from the rain.", "And there sat {a animal}. It was hungry and cold."],
        &["\"You are not scary at all,\" said {hero}.", "{Hero} laughed. \"It is only you!\" {he} said."],
        &[
            "{He} gave it some [milk|bread|warm soup] and a place by the fire.",
            "{He} let it in and dried it with a soft towel.",
        ],
        &["The {beast} fell asleep at {his} feet.", "The {beast} looked at {him} with big, thankful eyes."],
        &[
            "In the morning, {his} {parent} said, \"It can stay with us if you take care of it.\"",
            "In the morning, they were already good friends.",
        ],
        &[
            "{Hero} learned that what we fear is often just someone who needs a friend.",
            "{Hero} learned to look before {he} was afraid.",
        ],
    ],
    // Too many sweets.
    &[
        &[
            "{Day}, {his} {parent} baked a big plate of {foods}.",
            "{Day}, there was a plate of warm {foods} on the table.",
        ],
        &[
            "\"They are for everyone,\" said {his} {parent}. \"You may have one.\"",
            "\"Please take only one,\" said {his} {parent}.",
        ],
        &[
            "{Hero} ate one. It was so good that {he} ate another, and another.",
            "One {food} was not enough for {hero}. {He} ate two, then three, then four.",
        ],
        &["Soon the plate was empty.", "When {he} stopped, there was not one {food} left."],
        &["Then {his} tummy began to hurt.", "\"Oh, my tummy!\" said {hero}, and {he} had to lie down."],
        &[
            "{Friend} came to visit and asked, \"Are there any {foods} for me?\"",
            "When {friend} came, there was nothing for {fhim} to eat.",
        ],
        &[
            "{Hero} felt very bad. \"I ate them all,\" {he} said. \"I am sorry.\"",
            "{Hero}'s face turned red. \"They are all gone,\" {he} said.",
        ],
        &[
            "The next day, {hero} helped to bake new {foods} and gave the first one to {friend}.",
            "So {hero} helped {his} {parent} to bake some more, and {friend} got the biggest one.",
        ],
        &[
            "They ate them together, and they tasted even better.",
            "{He} ate only one, slowly, and it was the best of all.",
        ],
        &[
            "{Hero} learned not to be greedy.",
            "{Hero} learned that a little is enough, and that the rest is for friends.",
        ],
    ],
    // Taking without asking.
    &[
        &[
            "{Day}, {hero} saw {a thing} that belonged to {friend}.",
            "{Friend} had {a thing}, and {hero} liked it very much.",
        ],
        &[
            "{He} wanted to play with it, but {friend} was not there.",
            "\"I will only take it for a little while,\" {he} thought.",
        ],
        &["{He} took it without asking and went {to}.", "So {he} took the {toy} and did not ask."],
        &[
            "But {he} dropped it in the [mud|water], and it got dirty.",
            "While {he} was playing, {he} left it {spot} and forgot about it.",
        ],
        &[
            "That evening, {friend} was crying. \"Someone took my {toy}!\" {fhe} said.",
            "Soon {friend} was looking for {fhis} {toy} everywhere.",
        ],
        &["{Hero} felt a stone in {his} heart.", "When {hero} heard it, {he} felt very sorry."],
        &[
            "{He} ran back, got the {toy} and cleaned it until it was like new.",
            "{He} went to get the {toy} and wiped it clean.",
        ],
        &[
            "\"I took it,\" {he} said. \"I should have asked you first. I am sorry.\"",
            "\"Here is your {toy},\" said {hero}. \"It was wrong to take it.\"",
        ],
        &[
            "\"Next time, just ask,\" said {friend}. \"I will say yes.\"",
            "{Friend} dried {fhis} eyes. \"It is all right,\" {fhe} said. \"We can play with it together.\"",
        ],
        &["{Hero} learned to ask before {he} takes something.", "After that, {hero} always asked first."],
    ],
    // A messy room.
    &[
        &["{Hero} never liked to clean {his} room.", "{Hero}'s room was always a big mess."],
        &[
            "There were socks on the lamp and blocks under the bed.",
            "There were toys on the floor, on the chair and even in the bed.",
        ],
        &[
            "\"Please clean your room,\" said {his} {parent}. \"Later,\" said {hero}.",
            "\"I will do it tomorrow,\" {he} always said.",
        ],
        &[
            "{Day}, {friend} asked {him} to come {to} and bring {his} {thing}.",
            "{Day}, {hero} wanted to take {his} {thing} {to}.",
        ],
        &[
            "But {hero} could not find it. {He} looked and looked.",
            "But where was it? It was lost somewhere in the mess.",
        ],
        &[
            "{He} stepped on a block. \"Ouch!\" {he} cried.",
            "{He} looked under the bed, and a pile of books fell on {his} head.",
            "",
        ],
        &[
            "So {he} began to clean. {He} put the books on the shelf and the toys in the box.",
            "\"Now I must clean up,\" {he} said, and {he} picked up one thing after another.",
        ],
        &[
            "And there, under the last pile of clothes, was the {toy}!",
            "When the room was clean, the {thing} was right there, under a sock.",
        ],
        &["{He} ran {to} and was just in time.", "{He} was so happy that {he} danced around the clean room."],
        &[
            "{Hero} learned that everything is easy to find when it has its own place.",
            "From then on, {hero} cleaned {his} room every day.",
        ],
    ],
    // A gift made by hand.
    &[
        &[
            "It was the birthday of {his} {parent}, and {hero} had no gift.",
            "{Hero} wanted to give {his} {parent} something for {phis} birthday.",
        ],
        &["{He} looked in {his} money box, but it was empty.", "{He} went to the shop, but everything cost too much."],
        &[
            "{Hero} was sad. \"I have nothing to give,\" {he} told {friend}.",
            "\"What can I do without money?\" {he} asked {his} friend {friend}.",
        ],
        &["\"You can make something,\" said {friend}.", "\"The best gifts are made by hand,\" {friend} said."],
        &[
            "So they went {to} and picked flowers of every color.",
            "So {he} took some paper and paint and made a picture of the whole family.",
        ],
        &["{Hero} worked all day.", "It took a long time, but {he} did not stop."],
        &[
            "In the evening, {he} gave it to {his} {parent}. {His} {hand}s were shaking.",
            "\"This is for you,\" said {hero}. \"I made it myself.\"",
        ],
        &[
            "{His} {parent} had tears in {phis} eyes. \"It is beautiful,\" {phe} said.",
            "{His} {parent} smiled from ear to ear and hugged {him}.",
        ],
        &["They ate {foods} and sang a song.", "Then they all had {foods} and danced.", ""],
        &[
            "{Hero} learned that a gift from the heart is the best gift.",
            "{Hero} learned that love does not cost any money.",
        ],
    ],
    // Snow.
    &[
        &[
            "One winter morning, {hero} looked out, and everything was white.",
            "One day, it snowed and snowed until the fences were gone.",
        ],
        &[
            "\"Snow!\" {he} shouted, and {he} put on {his} hat and boots.",
            "{Hero} put on {his} warm coat and ran outside.",
        ],
        &[
            "{Friend} was there too, and they made a snowman.",
            "Together with {friend}, {he} rolled a big ball of snow, and then a smaller one.",
        ],
        &[
            "They gave it a carrot nose and two stones for eyes.",
            "It had a long nose, two black eyes and {a color} scarf.",
        ],
        &["\"He looks cold,\" said {friend}. \"He needs a friend.\"", "\"He should not be alone,\" said {hero}."],
        &["So they made another one, just as big.", "So they made a snow dog to sit beside him."],
        &[
            "When the sun came out, the snowmen began to melt.",
            "After some days, it got warm, and the snow began to drip.",
        ],
        &["{Hero} was sad. \"They are going away,\" {he} said.", "\"Please do not go,\" said {hero}."],
        &[
            "\"They will come back next winter,\" said {his} {parent}.",
            "\"Now they are water for the flowers,\" said {friend}.",
        ],
        &[
            "{Hero} learned that every season brings something new.",
            "{Hero} learned to enjoy each day while it is here.",
        ],
    ],
    // Learning something hard.
    &[
        &["All the others could {skill}, but {hero} could not.", "{Hero} wanted to learn to {skill}."],
        &["{Day}, {he} tried for the first time.", "{Day}, {he} went {to} to try."],
        &[
            "It did not work at all, and {he} fell down.",
            "{He} tried once, and twice, and three times. Each time, it went wrong.",
        ],
        &[
            "Someone laughed, and {hero} wanted to hide.",
            "\"It is too hard for me,\" {he} said, and a tear ran down {his} nose.",
        ],
        &[
            "{His} {parent} said, \"I could not do it at first, too. Try a little every day.\"",
            "{Friend} sat down beside {him}. \"I fell down a hundred times before I could do it,\" {fhe} said.",
        ],
        &["So {hero} practised every day, even when it rained.", "So {he} got up and tried again, every day."],
        &[
            "Each day, it was a little bit easier.",
            "On Monday it was bad, on Tuesday it was better, and on Sunday it was good.",
        ],
        &["Then, one day, {he} could do it!", "And all at once, it worked!"],
        &["\"Look at me! I can {skill}!\" {he} shouted.", "\"You did it!\" cried {friend}. \"You can {skill}!\""],
        &["{Hero} learned that practice makes hard things easy.", "{Hero} learned never to give up."],
    ],
    // Catching the moon.
    &[
        &[
            "One night, {hero} saw the moon in the water of the pond.",
            "One night, the moon was so round and bright that {hero} wanted to have it.",
        ],
        &[
            "\"I will catch it and put it in my room,\" {he} said.",
            "\"If I had the moon, I would never need a lamp,\" {he} thought.",
        ],
        &["{He} took a bucket and went to the pond.", "{He} got {his} net and ran down to the water."],
        &[
            "{He} dipped it in, but the moon broke into a hundred pieces.",
            "Each time {he} tried, the moon slipped away.",
        ],
        &["\"I have hurt it!\" cried {hero}.", "{Hero} sat down on a stone. \"It does not like me,\" {he} said."],
        &[
            "A frog laughed. \"The moon is not in the pond,\" it said. \"Look up!\"",
            "\"That is only a picture of the moon,\" said an old frog. \"Look up!\"",
        ],
        &["{Hero} looked up, and there was the moon, whole and bright.", "There it was, high above the trees."],
        &[
            "\"It shines for everyone,\" said the frog. \"That is why nobody can keep it.\"",
            "\"It is too big for your bucket,\" said the frog, \"but you can look at it every night.\"",
        ],
        &[
            "{Hero} waved at the moon and went home to bed.",
            "So they sat side by side and looked at it for a long time.",
        ],
        &["{Hero} learned that some things are beautiful because they belong to everyone."],
    ],
    // A boat on the river.
    &[
        &[
            "{Day}, {hero} and {friend} made a little boat out of wood.",
            "{Day}, {hero} and {friend} made a boat with {a color} sail.",
        ],
        &[
            "They put it on the river, and it sailed away, faster and faster.",
            "They set it on the water. It went around a stone and under the bridge.",
        ],
        &["\"Wait!\" they cried, and they ran along the river.", "They ran after it over roots and stones."],
        &[
            "Then they saw {a animal} on a small island. The water was all around it.",
            "In the middle of the river sat {a animal} on a stone. It could not swim.",
        ],
        &["\"Help!\" it cried. \"The water is too high!\"", "It was wet and shaking with fear."],
        &["{Hero} had an idea. {He} tied a rope to the little boat.", "\"Our boat can save it!\" said {friend}."],
        &[
            "The boat went to the {beast}, and the {beast} jumped in.",
            "They pushed the boat with a long stick until the {beast} could step in.",
        ],
        &["Then they pulled and pulled, and it was safe.", "Slowly they pulled it back to the land."],
        &[
            "\"You saved me!\" said the {beast}. \"Thank you!\"",
            "The {beast} was so happy that it danced in the grass.",
        ],
        &[
            "They learned that even a small boat can do a big thing.",
            "They learned that two friends with one idea can do a lot.",
        ],
    ],
    // A quarrel and a bridge.
    &[
        &[
            "{Hero} and {friend} were friends, but {day}, they had a fight about {a thing}.",
            "{Day}, {hero} and {his} friend {friend} wanted the same {toy}, and they began to shout.",
        ],
        &["\"I will never talk to you again!\" said {hero}.", "\"You are mean!\" said {friend}. \"Go away!\""],
        &["{Hero} went home and shut the door.", "They both went home, and each of them was angry."],
        &["But the day was long and boring without {friend}.", "{Hero} tried to {hobby}, but it was no fun alone."],
        &[
            "\"Why are you so quiet?\" asked {his} {parent}. {Hero} told {phim} everything.",
            "{His} {parent} said, \"Someone has to say sorry first. It can be you.\"",
        ],
        &["{Hero} took {a food} and went to the house of {his} friend.", "So {hero} put on {his} shoes and went out."],
        &[
            "Half way there, {he} met {friend}, who was coming to see {him}!",
            "When {he} opened the door, {friend} was already standing there.",
        ],
        &[
            "\"I am sorry,\" they both said at the same time.",
            "\"I am sorry,\" said {hero}. \"So am I,\" said {friend}.",
        ],
        &["Then they laughed and went {to} together.", "They laughed until they had tears in their eyes."],
        &[
            "{Hero} learned that it is never too late to say sorry.",
            "{Hero} learned that a friend is worth more than being right.",
        ],
    ],
    // The rain spoils the day, or does it.
    &[
        &[
            "{Hero} wanted to have a picnic {at} with {friend}.",
            "{Hero} and {friend} had a plan. They wanted to have a picnic {at}.",
        ],
        &[
            "They packed {foods} and a bottle of juice in a basket.",
            "In the basket, there were {foods}, apples and cheese.",
        ],
        &["But when they were there, big drops began to fall.", "But then dark clouds came, and it began to rain."],
        &[
            "\"Our day is ruined!\" said {hero}.",
            "{Hero} was angry at the rain.",
            "\"Oh no,\" said {friend}. \"We are getting wet!\"",
        ],
        &["They ran home as fast as they could.", "They hid under a big tree, but the rain came through the leaves."],
        &[
            "Then {friend} had an idea. \"Let us have our picnic at home, under the table!\"",
            "\"We can still have a picnic,\" said {his} {parent}. \"Come inside!\"",
        ],
        &[
            "They put a blanket over the table and made a [tent|cave|little house].",
            "They sat on the rug by the fire and ate everything.",
        ],
        &[
            "The rain sang on the roof, and they told each other stories.",
            "Outside it was wet, but inside it was warm and dry.",
        ],
        &[
            "Later, there was a rainbow over {place}.",
            "\"This is the best picnic ever,\" said {hero}.",
            "When they came out, they jumped in all the puddles.",
        ],
        &[
            "{Hero} learned that a bad start can turn into a good day.",
            "{Hero} learned that you can have fun in any weather.",
        ],
    ],
    // A treasure map.
    &[
        &[
            "{Day}, {hero} and {friend} found a map in {a thing2}.",
            "{Day}, {hero} and {friend} found a map. It had a big red cross on it.",
        ],
        &["\"It is a treasure map!\" {he} said.", "\"There must be gold!\" said {hero}."],
        &[
            "The map showed the way {to}, so they went there at once.",
            "They followed the map over the bridge and past {place}.",
        ],
        &[
            "They counted ten steps from the old tree and began to dig.",
            "\"Here it is,\" said {friend}. They dug a deep hole.",
        ],
        &["Soon they hit something hard. It was a small box.", "At last, they found a box under the roots."],
        &["There was no gold in it, only a letter.", "They opened it. There was only a piece of paper inside."],
        &[
            "It said, \"If you came here with a friend, you have found the treasure.\"",
            "The letter said, \"The real treasure stands beside you.\"",
        ],
        &["{Hero} looked at {friend}, and they both smiled.", "First they were quiet. Then they began to laugh."],
        &[
            "They put their own letter in the box and hid it again {spot}.",
            "They ate {foods} under the tree and watched the sun go down.",
        ],
        &["{Hero} learned that a friend is better than gold."],
    ],
    // Helping someone old.
    &[
        &[
            "Near {place} lived an old [woman|man|neighbor] with a big garden.",
            "There was an old house near {place}, and everyone said that it was scary.",
        ],
        &[
            "{Day}, {hero} lost {his} {toy} there. It flew over the fence.",
            "{Day}, {hero}'s {thing} fell over the fence.",
        ],
        &["{He} was afraid to knock, but {he} did it.", "{His} heart was beating fast when {he} knocked at the door."],
        &["The door opened. \"Yes?\" said a soft voice.", "The door opened, and there was a friendly face."],
        &[
            "\"My {toy} fell into your garden,\" said {hero}. \"May I get it, please?\"",
            "\"I am sorry,\" said {hero}. \"My {toy} flew into your garden.\"",
        ],
        &[
            "\"Of course,\" said the voice. \"I am too old to pick the apples. Can you help me?\"",
            "\"Come in,\" said the voice. \"Nobody ever comes to see me.\"",
        ],
        &[
            "So {hero} stayed and helped until the basket was full.",
            "{Hero} picked the apples, and they talked all day.",
        ],
        &["They had tea and {foods} in the kitchen.", "{He} got {his} {toy} and a warm {food} as well."],
        &["From then on, {he} came to help every week.", "\"Please come again,\" said the voice, and {hero} did."],
        &[
            "{Hero} learned not to believe everything that people say.",
            "{Hero} learned that lonely people can be the kindest friends.",
        ],
    ],
    // A secret of the bird.
    &[
        &[
            "{Day}, a little bird sat on {hero}'s window, but it did not sing.",
            "{Day}, {hero} met a small bird that could not sing.",
        ],
        &["\"Why do you not sing?\" asked {hero}.", "\"All the birds sing. Why are you so quiet?\" asked {hero}."],
        &[
            "\"My song is not as good as the others,\" said the bird.",
            "\"The others laugh at my voice,\" said the bird.",
        ],
        &["\"I want to hear it,\" said {hero}. \"Please!\"", "\"Nobody has a song like yours,\" said {hero}."],
        &["But the bird only shook its head.", "But the bird was too shy."],
        &[
            "So {hero} began to sing {him}self, loud and wrong.",
            "\"Then I will sing first,\" said {hero}, and {he} sang very badly.",
        ],
        &[
            "The bird laughed so much that it forgot to be afraid.",
            "The bird had to laugh, and then it began to sing along.",
        ],
        &["Its song was soft and strange and beautiful.", "Its voice was low and warm like the sun in the evening."],
        &[
            "All the other birds came to listen.",
            "{Friend} stopped in the street to listen. \"How lovely!\" {fhe} said.",
        ],
        &[
            "The bird learned that there is room for every song.",
            "{Hero} learned that everyone needs a little courage to begin.",
        ],
    ],
    // The tall tower of blocks.
    &[
        &[
            "{Day}, {hero} and {friend} built a tower {at}.",
            "{Day}, {hero} and {friend} wanted to build the tallest tower in the world.",
        ],
        &[
            "{He} used boxes, stones and even {his} {thing}.",
            "It was as tall as {his} {parent}, and it had {a color} flag on top.",
        ],
        &[
            "\"Do not build it so fast,\" said {friend}.",
            "\"The bottom is too weak,\" said {friend}. But {hero} did not listen.",
        ],
        &[
            "Then {a animal} ran by and touched it, and the tower fell down.",
            "The tower leaned to the left, then to the right, and then it fell down.",
        ],
        &[
            "{Hero} was angry and kicked a box. \"All my work is gone!\" {he} cried.",
            "Boom! Now there was only a big pile, and {hero} began to cry.",
        ],
        &[
            "{Friend} put an arm around {him}. \"We can build it again,\" {fhe} said.",
            "\"Take a deep breath,\" said {friend}. \"Then we start again.\"",
        ],
        &[
            "This time, they put the biggest stones at the bottom.",
            "This time, they worked slowly and listened to each other.",
        ],
        &["The new tower was not so tall, but it stood.", "When the wind came, the new tower did not move at all."],
        &["They sat in front of it and ate {foods}.", "\"It is perfect,\" said {hero}."],
        &[
            "{Hero} learned that a strong start is better than a fast one.",
            "{Hero} learned to listen to {his} friends.",
        ],
    ],
];

/// Girls, boys, and animals that may be either.
pub const GIRLS: &[&str] =
    &["Nora", "Ada", "Mina", "Rosa", "Tess", "Ivy", "Clara", "Wren", "Juno", "Elsie", "Maya", "Zuri", "Lena", "Anna"];
/// Boys.
pub const BOYS: &[&str] =
    &["Otto", "Finn", "Theo", "Milo", "Hugo", "Emil", "Omar", "Jonas", "Ravi", "Kofi", "Felix", "Arlo", "Ned", "Sam"];
/// Names of animals.
pub const PETS: &[&str] =
    &["Pip", "Bramble", "Moss", "Clover", "Button", "Acorn", "Pebble", "Tumble", "Hazel", "Fern", "Dot", "Nibble"];
/// What animal heroes are.
pub const SPECIES: &[&str] =
    &["fox", "bear", "rabbit", "mouse", "pig", "hedgehog", "otter", "badger", "squirrel", "mole", "beaver", "duck"];
/// What comes before `girl`, `boy` or an animal.
pub const SMALL: &[&str] = &["little", "young", "small"];
/// Where the hero lives.
pub const HOMES: &[&str] = &[
    "in a small village",
    "in a little house by the sea",
    "near a deep forest",
    "at the foot of a green hill",
    "in a house with a red roof",
    "beside a quiet river",
    "at the edge of a town",
    "in a valley full of flowers",
];
/// What the hero loves to do.
pub const HOBBIES: &[&str] =
    &["sing", "draw", "read", "dance", "climb trees", "jump in puddles", "look at the stars", "tell stories"];
/// What may be learned.
pub const SKILLS: &[&str] =
    &["swim", "ride a bike", "whistle", "skate", "jump rope", "climb the big tree", "play the flute", "catch a ball"];
/// Colours.
pub const COLORS: &[&str] =
    &["red", "blue", "green", "yellow", "orange", "purple", "white", "silver", "golden", "pink"];
/// Toys.
pub const TOYS: &[&str] = &[
    "ball", "drum", "boat", "doll", "hat", "scarf", "bell", "book", "whistle", "bear", "bucket", "train", "cap",
    "wagon",
];
/// Things to find something in.
pub const CHESTS: &[&str] = &["old book", "old chest", "dusty box", "broken clock", "glass bottle"];
/// Things that break.
pub const VASES: &[&str] = &["vase", "blue bowl", "big cup", "lamp", "teapot", "mirror"];
/// Sweet things, one and many.
pub const FOODS: &[(&str, &str)] = &[
    ("pancake", "pancakes"),
    ("apple cake", "apple cakes"),
    ("plum tart", "plum tarts"),
    ("honey bun", "honey buns"),
    ("berry muffin", "berry muffins"),
    ("jam roll", "jam rolls"),
    ("nut cookie", "nut cookies"),
    ("lemon cake", "lemon cakes"),
];
/// Grown-ups and whether they are women.
pub const PARENTS: &[(&str, bool)] = &[
    ("mother", true),
    ("father", false),
    ("grandmother", true),
    ("grandfather", false),
    ("aunt", true),
    ("uncle", false),
    ("mother", true),
    ("father", false),
];
/// Animals that are met.
pub const BEASTS: &[&str] =
    &["cat", "dog", "kitten", "puppy", "rabbit", "hen", "goat", "mouse", "hedgehog", "lamb", "squirrel", "pony"];
/// What such an animal is like.
pub const SIZES: &[&str] = &["tiny", "small", "little", "young", "shy", "brown", "white", "grey", "black"];
/// Places: the way there, being there, the place.
pub const PLACES: &[(&str, &str, &str)] = &[
    ("to the park", "in the park", "the park"),
    ("to the river", "by the river", "the river"),
    ("to the green hill", "on the green hill", "the green hill"),
    ("to the meadow", "in the meadow", "the meadow"),
    ("to the beach", "on the beach", "the beach"),
    ("to the pond", "by the pond", "the pond"),
    ("to the garden", "in the garden", "the garden"),
    ("to the old mill", "by the old mill", "the old mill"),
    ("to the orchard", "in the orchard", "the orchard"),
    ("to the farm", "on the farm", "the farm"),
    ("to the lake", "by the lake", "the lake"),
    ("to the big field", "in the big field", "the big field"),
];
/// Where something may lie.
pub const SPOTS: &[&str] = &[
    "in the tall grass",
    "under a bush",
    "behind a big stone",
    "under a pile of leaves",
    "beside an old log",
    "behind the oak tree",
    "in a hollow tree",
    "under a wooden bench",
];
/// Times of the day.
pub const TIMES: &[&str] = &["morning", "day", "afternoon"];
