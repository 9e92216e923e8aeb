// What the panel's page does by itself: keys of the Preferences tab, and clicks on tokens of the Inside tab.
// Everything else is done by the server.
(() => {
  const KEYS = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip", u: "undo" };
  const PATIENCE = 3000; // milliseconds that a decision may take before the same pair can be decided again
  let decided = null; // the pair that was on the page when a key was last pressed, and the time
  const isSeen = (element) => element !== null && element.offsetParent !== null;

  // Keys belong to the page only where nothing else takes them: no box, no slider, no tab, no open list.
  const takesKeys = (element) =>
    element?.closest("input, textarea, select, [contenteditable=true], [role=tab], [role=slider], [role=listbox], pre");

  document.addEventListener("keydown", (event) => {
    const choice = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!choice || event.repeat || event.ctrlKey || event.altKey || event.metaKey || takesKeys(event.target)) return;
    const button = document.querySelector(`#panel-choice-${choice}`);
    const pair = document.querySelector("#panel-pair");
    if (!isSeen(button) || !isSeen(pair)) return;
    event.preventDefault();
    if (decided && decided.html === pair.innerHTML && Date.now() - decided.time < PATIENCE) return;
    decided = { html: pair.innerHTML, time: Date.now() };
    button.click();
  });

  // A click on a token moves the slider of the position.
  document.addEventListener("click", (event) => {
    const token = event.target.closest?.(".tokens [data-at]");
    const box = document.querySelector("#panel-position input[type=number]");
    if (!token || !box) return;
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(box, token.dataset.at);
    for (const name of ["input", "change"]) box.dispatchEvent(new Event(name, { bubbles: true }));
  });
})();
