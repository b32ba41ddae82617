"use strict";

/* Index: search as you type, filters, sorting. The choices stand in the address, so that a view can be linked. */
const STOP = new Set("a an and are as at be by can do does for from has how in is it of on or the than that to was what when which who why with".split(" "));
const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
const tokens = (text) => words(text).filter((word) => !STOP.has(word)).map((word) => (word.length > 3 ? word.replace(/s$/, "") : word));
const fits = (wanted, text) => wanted.every((token) => text.some((word) => word.startsWith(token)));

function startIndex(form) {
  const list = document.getElementById("papers");
  const papers = [...list.children].map((item) => ({
    item,
    data: item.dataset,
    details: item.querySelector("details"),
    answer: item.querySelector(".answer"),
    marks: [...item.querySelectorAll(".marks a")],
    text: words(item.dataset.text),
    claims: [...item.querySelectorAll(".claims li")].map((line) => ({
      line, state: line.querySelector(".state"), text: words(item.dataset.name + " " + line.dataset.text),
    })),
  }));
  const field = (id) => document.getElementById(id);
  const boxes = [...form.querySelectorAll("[name=verdict]")];
  const template = (state) => document.querySelector(`template[data-mark="${state}"]`).content.cloneNode(true);

  function show(profile) {
    for (const paper of papers) {
      paper.answer.textContent = paper.item.getAttribute(`data-answer-${profile}`);
      paper.claims.forEach((claim, i) => {
        const state = claim.line.dataset[profile];
        claim.verdict = state;
        claim.state.replaceChildren(template(state));
        const mark = template(state).querySelector("svg");
        mark.removeAttribute("aria-hidden");
        mark.setAttribute("role", "img");
        mark.setAttribute("aria-label", state);
        paper.marks[i].replaceChildren(mark);
        paper.marks[i].title = `${state}: ${claim.line.querySelector("a").textContent}`;
      });
    }
  }

  function filter() {
    const wanted = tokens(field("q").value);
    const verdicts = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const family = field("family").value;
    const profile = field("profile").value;
    const narrow = wanted.length > 0 || verdicts.size > 0;
    let shown = 0, claims = 0;
    for (const paper of papers) {
      let found = 0;
      const byClaim = paper.claims.map((claim) => fits(wanted, claim.text) && (!verdicts.size || verdicts.has(claim.verdict)));
      const asked = byClaim.filter(Boolean).length;
      const inText = asked === 0 && verdicts.size === 0 && fits(wanted, paper.text);
      const ran = profile === "best" || paper.claims.some((claim) => claim.verdict !== "not run" && claim.verdict !== "out of reach");
      const visible = (asked > 0 || inText) && ran && (!family || paper.data.family === family);
      paper.item.hidden = !visible;
      paper.claims.forEach((claim, i) => {
        claim.line.hidden = !(byClaim[i] || inText);
        found += !claim.line.hidden;
      });
      if (narrow !== paper.narrow) paper.details.open = narrow && !inText;
      paper.narrow = narrow;
      if (visible) { shown += 1; claims += found; }
    }
    field("status").textContent = `${shown} of ${papers.length} papers, ${claims} claim${claims === 1 ? "" : "s"}`;
    field("none").hidden = shown > 0;
  }

  function sort() {
    const key = field("sort").value;
    const count = (paper, state) => paper.claims.filter((claim) => claim.verdict === state).length;
    const value = {
      family: () => 0,
      name: () => 0,
      year: (paper) => -paper.data.year,
      held: (paper) => -count(paper, "reproduced"),
      open: (paper) => -count(paper, "inconclusive"),
      seconds: (paper) => Number(paper.data.seconds || Infinity),
    }[key];
    const order = papers.map((paper, place) => ({ paper, place, value: value(paper) }));
    order.sort((a, b) => a.value - b.value || (key === "name" ? a.paper.data.slug.localeCompare(b.paper.data.slug) : a.place - b.place));
    list.append(...order.map((entry) => entry.paper.item));
  }

  function remember() {
    const state = new URLSearchParams();
    for (const id of ["q", "family", "profile", "sort"]) {
      const initial = field(id).options ? field(id).options[0].value : "";
      if (field(id).value !== initial) state.set(id, field(id).value);
    }
    for (const box of boxes) if (box.checked) state.append("verdict", box.value);
    history.replaceState(null, "", "#" + state);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const id of ["q", "family", "profile", "sort"]) if (state.has(id)) field(id).value = state.get(id);
    const chosen = new Set(state.getAll("verdict"));
    for (const box of boxes) box.checked = chosen.has(box.value);
  }

  function update() { show(field("profile").value); sort(); filter(); }
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["input", "change"]) form.addEventListener(kind, () => { update(); remember(); });
  recall();
  update();
}

/* Notebook: mathematics, and all code at once. */
function startNotebook(article) {
  renderMathInElement(article, {
    delimiters: [
      { left: "$$", right: "$$", display: true }, { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false }, { left: "$", right: "$", display: false },
    ],
    throwOnError: false,
  });
  const button = document.getElementById("unfold");
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(open));
    for (const cell of article.querySelectorAll("details.code")) cell.open = open;
  });
}

const form = document.getElementById("filters");
if (form) startIndex(form);
const article = document.getElementById("notebook");
if (article) startNotebook(article);
