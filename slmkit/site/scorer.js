// Sphinx asks this for the score of what the search found: lessons go first, then pages, then single names of the library.
var Scorer = {
  score: ([page, title, anchor, text, score, file, kind]) =>
    score + (/^(distill|reason|adapt|compress|infer|synth|pretrain|align|retrieve|judge|agents|senses)\//.test(page) ? 50 : 0)
          + (/_repro|\/index$/.test(page) ? -40 : 0) + (kind === "object" ? -10 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
