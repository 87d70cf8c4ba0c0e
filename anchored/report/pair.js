// Shows a pair, for the report and for `anchored inspect`: prompt, answers with their differences marked, reasoning.
// Texts reach the page as text (textContent) only.
"use strict";

const REMOVED = 1, ADDED = 2;

/** An element with text in it; text is never read as HTML. */
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = visible(text);
  return element;
}

/** Control characters as their pictures (␛ for escape), so that what is in a text can be seen. */
function visible(text) {
  const picture = (c) => (c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, picture);
}

/** A paragraph of somebody's text. */
function paragraph(text = "", className = "text") {
  const element = make("p", className, text);
  element.dir = "auto";
  return element;
}

/** Parts [kind, words] as a paragraph with the differences marked; parts of the kind `without` are left out. */
function marked(parts, without, compared = true) {
  const text = paragraph();
  for (const [part, words] of parts) {
    if (part === without) continue;
    const tag = part === REMOVED ? "del" : part === ADDED ? "ins" : "span";
    text.append(make(compared ? tag : "span", "", words));
  }
  return text;
}

/** "Revision y_w · its model", with the paper's symbol. */
function heading(title, subscript, by) {
  const element = make("h3", "", `${title} `);
  const symbol = make("i", "", "y");
  symbol.append(make("sub", "", subscript));
  element.append(symbol, make("span", "by", by ? ` · ${by}` : ""));
  return element;
}

function cutNote(left) {
  return make("p", "note", `${left.toLocaleString("en")} more characters are not in this page.`);
}

function answerBlock(kind, title, by, row, without) {
  const block = make("div", kind);
  block.append(heading(title, kind === "chosen" ? "w" : "l", by));
  const text = marked(row.parts, without, row.compared);
  block.append(text.textContent ? text : make("p", "empty", "no text"));
  const left = kind === "chosen" ? row.chosen_cut : row.rejected_cut;
  if (left) block.append(cutNote(left));
  return block;
}

/** Both answers in one text: what only the rejected one says beside what only the chosen one says. */
function mergedBlock(titles, row) {
  const block = make("div", "merged");
  const heads = make("div", "heads");
  heads.append(heading(titles.rejected, "l", row.rejected_by), heading(titles.chosen, "w", row.chosen_by));
  block.append(heads, marked(row.parts, null));
  if (row.rejected_cut || row.chosen_cut) block.append(cutNote(Math.max(row.rejected_cut, row.chosen_cut)));
  return block;
}

/** The answers under the names that the method gives them. */
function answersView(row, merged = false) {
  const titles = row.method === "clair"
    ? { rejected: "Answer", chosen: "Revision" } : { rejected: "Rejected", chosen: "Chosen" };
  const answers = make("div", merged && row.compared ? "answers whole" : "answers");
  if (merged && row.compared) answers.append(mergedBlock(titles, row));
  else {
    answers.append(
      answerBlock("rejected", titles.rejected, row.rejected_by, row, ADDED),
      answerBlock("chosen", titles.chosen, row.chosen_by, row, REMOVED),
    );
  }
  return answers;
}

/** The elements that show a pair, in their order. */
function pairView(row, merged = false) {
  const parts = [];
  const meta = make("p", "meta");
  meta.append(make("span", row.outcome === "ok" ? "tag ok" : "tag refused", row.outcome));
  for (const fact of row.facts) meta.append(make("span", "", fact));
  parts.push(meta);
  if (row.detail) parts.push(make("p", "why", row.detail));
  for (const [role, content] of row.prompt) {
    const turn = make("div", "turn");
    turn.append(make("h3", "", row.prompt.length === 1 ? "Prompt" : role), paragraph(content));
    parts.push(turn);
  }
  parts.push(answersView(row, merged));
  if (row.rational) {
    const details = make("details");
    details.append(make("summary", "", "The reasoning that came with it"), paragraph(row.rational));
    parts.push(details);
  }
  return parts;
}

/** Colour what was searched for, without touching the text; returns where it stands. */
function markHits(element, search) {
  const ranges = [];
  if (!CSS.highlights) return ranges;
  CSS.highlights.delete("search");
  const wanted = search.trim().toLowerCase();
  if (!wanted) return ranges;
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.data.toLowerCase();
    if (text.length !== node.data.length) continue;
    for (let from = text.indexOf(wanted); from >= 0; from = text.indexOf(wanted, from + wanted.length)) {
      const range = new Range();
      range.setStart(node, from);
      range.setEnd(node, from + wanted.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("search", new Highlight(...ranges));
  return ranges;
}
