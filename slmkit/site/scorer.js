// Sphinx asks this for the score of what its search found: what the field calls by the words asked for goes first,
// then lessons, then other pages, then single names of the library.
const LESSONS = {};  // page -> the names of what it teaches: filled in when the site is staged
const ASKED = (new URLSearchParams(location.search).get("q") || "").toLowerCase().trim();
const called = page => Math.max(0, ...(LESSONS[page] || []).map(
  name => name === ASKED ? 100 : ASKED && name.includes(ASKED) ? 50 * ASKED.length / name.length : 0));
var Scorer = {
  score: ([page, title, anchor, text, score, file, kind]) => score + called(page)
    + (LESSONS[page] && !anchor ? 50 : 0) - (/_repro|\/index$/.test(page) ? 40 : 0) - (kind === "object" ? 10 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
