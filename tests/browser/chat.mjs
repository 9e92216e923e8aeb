// Drives the chat at `url` like a person and prints what it saw as one JSON object; screenshots go to `folder`.
// node chat.mjs URL FOLDER CHROMIUM

import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, folder, executablePath] = process.argv.slice(2);
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const seen = { external: [], errors: [] };
const WAIT = 120_000; // ms; a machine that is only busy takes less
const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
const context = await browser.newContext({ viewport: { width: 1100, height: 800 } });
await context.grantPermissions(["clipboard-read", "clipboard-write"]);
const page = await context.newPage();
page.setDefaultTimeout(WAIT);
page.on("request", (request) => {
  const target = new URL(request.url());
  if (/^(http|ws)/.test(target.protocol) && target.host !== new URL(url).host) seen.external.push(request.url());
});
page.on("pageerror", (error) => seen.errors.push(String(error)));

const box = page.locator("#fathom-question textarea");
const first = page.locator("#fathom-chat-0");
const answers = first.locator('[data-testid="bot"]');
const questions = first.locator('[data-testid="user"]');
const button = (name) => page.getByRole("button", { name, exact: true });
const notes = page.locator("#fathom-chat-0 .note");
const withoutNotes = (element) => {
  for (const note of element.querySelectorAll(".note")) note.closest("p").style.display = "none";
  const text = element.innerText.trim();
  for (const note of element.querySelectorAll(".note")) note.closest("p").style.display = "";
  return text;
};
const lastAnswer = () => answers.last().evaluate(withoutNotes);
const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
const screenshot = (name) => page.screenshot({ path: `${folder}/${name}.png` });
const idle = () => page.locator("button.submit-button").waitFor();
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function until(what, condition) {
  const start = Date.now();
  while (!(await condition())) {
    if (Date.now() - start > WAIT) throw new Error(`waited in vain for ${what}; page says: ${await page.innerText("body")}`);
    await sleep(20);
  }
}

async function ask(question) {
  const before = await answers.count();
  await box.fill(question);
  await box.press("Enter");
  await until(`an answer to ${question}`, async () => (await answers.count()) > before);
}

async function settings(isOpen) {
  const slider = page.getByLabel("number input for Temperature");
  if ((await slider.isVisible()) !== isOpen) await page.getByRole("button", { name: /^Settings/ }).click();
  await slider.waitFor({ state: isOpen ? "visible" : "hidden" });
}

async function set(label, value) {
  await settings(true);
  const number = page.getByLabel(`number input for ${label}`);
  await number.fill(String(value));
  await number.press("Tab");
}

async function clear() {
  await button("Clear").click();
  await until("an empty chat", async () => (await answers.count()) === 0);
}

async function main() {
  await page.goto(url);
  await box.waitFor();
  seen.title = await page.title();
  seen.heading = await page.locator("h2").innerText();
  seen.visibleSliders = await page.locator('input[type="range"]:visible').count();
  await page.getByText("Who are you?").waitFor();
  await screenshot("1-start");
  seen.tabOrder = await tabOrder(7);

  // An empty box is nothing to complain about.
  await box.press("Enter");
  await sleep(1000);
  seen.empty = { toasts: await page.locator(".toast-body").count(), value: await box.inputValue() };

  // An example is a question; the answer grows while it is read.
  await page.getByText("Who are you?").click();
  await until("the example's answer", async () => (await answers.count()) === 1);
  await idle();
  seen.example = await lastAnswer();
  seen.speed = await notes.last().innerText();
  await clear();

  await ask("Ava has 12 apples. She buys 7 more. How many?");
  await idle();
  seen.calculator = await lastAnswer();
  seen.calls = await page.locator('[data-testid="bot"] .tool').allInnerTexts();
  await first.getByRole("button", { name: "Copy message" }).last().click();
  await until("a copied answer", async () => (await clipboard()) !== "");
  seen.copied = await clipboard();
  await screenshot("2-calculator");
  await set("Temperature", 2);
  await set("Top-k", 0);
  await button("Retry").click();
  await until("another answer", async () => (await answers.count()) === 1 && (await lastAnswer()) !== seen.calculator);
  await idle();
  seen.again = { answer: await lastAnswer(), questions: await questions.count(), answers: await answers.count() };
  await set("Temperature", 0);
  await set("Top-k", 50);
  await settings(false);

  await button("Undo").click();
  await until("an empty chat", async () => (await questions.count()) === 0);
  await until("the question in the box", async () => (await box.inputValue()) !== "");
  seen.undone = await box.inputValue();

  await ask("Greet me.");
  await idle();
  seen.unicode = await lastAnswer();
  await clear();

  await ask("List two.");
  await idle();
  seen.markdown = {
    text: await lastAnswer(),
    bullets: await page.locator('[data-testid="bot"] li').count(),
    code: await page.locator('[data-testid="bot"] code').allInnerTexts(),
    bold: await page.locator('[data-testid="bot"] b').count(),
  };
  await screenshot("3-markdown");
  await clear();

  await hostile();
  await edited();
  await reloaded();
  await stopped();
  await tooLong();
  await looks();
  await sideBySide();
}

async function tabOrder(n) {
  const order = [];
  for (let i = 0; i < n; i++) {
    await page.keyboard.press("Tab");
    order.push(
      await page.evaluate(() => {
        const at = document.activeElement;
        return (at.getAttribute("aria-label") ?? (at.innerText || at.placeholder)).split("\n")[0];
      }),
    );
  }
  return order;
}

// What would load something from elsewhere appears as it was written, in questions as in answers.
async function hostile() {
  const text = "![a](http://evil.example/a.png) <img src=http://evil.example/b.png> *a* &amp;\n```\n    <img src=http://evil.example/c.png>";
  await ask(text);
  await idle();
  seen.hostile = {
    asked: text,
    text: await questions.last().innerText(),
    images: await page.locator('[data-testid="user"] img, [data-testid="bot"] img').count(),
  };
  await screenshot("6-hostile");
  await first.getByRole("button", { name: "Copy message" }).first().click();
  await until("a copied question", async () => (await clipboard()).includes("evil.example"));
  seen.hostile.copied = await clipboard();
  await first.getByRole("button", { name: "Edit" }).click();
  const field = first.locator("textarea.edit-textarea");
  await until("the question in the field", async () => (await field.inputValue()).includes("```"));
  seen.hostile.edited = await field.inputValue();
  await button("Cancel").click();
  await clear();
}

async function edited() {
  await ask("Greet me.");
  await idle();
  await ask("Again.");
  await idle();
  await first.getByRole("button", { name: "Edit" }).first().click();
  const field = first.locator("textarea.edit-textarea");
  await until("the question in the field", async () => (await field.inputValue()) === "Greet me.");
  await field.fill("Who are you?");
  await button("Submit").click();
  await until("the edited question", async () => (await questions.allInnerTexts()).join() === "Who are you?");
  await until("its answer", async () => (await answers.count()) === 1 && (await lastAnswer()).includes("anything"));
  await idle();
  seen.edited = { questions: await questions.allInnerTexts(), answer: await lastAnswer() };
}

// A reload keeps the chat; older ones are in the list, from which they can be taken up and deleted.
async function reloaded() {
  await page.reload();
  await until("the chat of before", async () => (await answers.count()) === 1);
  seen.reloaded = { questions: await questions.allInnerTexts(), answer: await lastAnswer() };
  await page.getByLabel("Toggle Sidebar").click();
  await button("New chat").click();
  await until("a new chat", async () => (await questions.count()) === 0);
  await ask("Greet me.");
  await idle();
  await until("two chats in the list", async () => (await page.locator("#fathom-chats .pick").count()) >= 2);
  await screenshot("7-chats");
  await button("Who are you?").first().click();
  await until("the older chat", async () => (await questions.allInnerTexts()).join() === "Who are you?");
  const download = page.waitForEvent("download");
  await button("Export as JSON").click();
  seen.exported = JSON.parse(await readFile(await (await download).path(), "utf8"));
  const text = page.waitForEvent("download");
  await button("Export as text").click();
  seen.exportedText = await readFile(await (await text).path(), "utf8");
  const before = await page.locator("#fathom-chats .pick").count();
  await page.getByRole("button", { name: "Delete chat: Greet me." }).first().click();
  await until("a shorter list", async () => (await page.locator("#fathom-chats .pick").count()) === before - 1);
  await page.getByLabel("Toggle Sidebar").click();
  await clear();
}

// A song without end: it streams, and the stop button ends it. A context that overflows is no crash.
async function stopped() {
  await ask("Sing.");
  const lengths = new Set();
  await until("a growing answer", async () => lengths.add((await lastAnswer()).length).size > 3);
  seen.frames = lengths.size;
  await page.locator("button.stop-button").click();
  await idle();
  await sleep(500);
  const song = await lastAnswer();
  await sleep(1000);
  seen.stopped = { length: song.length, later: (await lastAnswer()).length, text: song.slice(0, 9) };
  await ask("long ".repeat(1000));
  await idle();
  seen.overflow = await notes.allInnerTexts();
  for (const question of ["Who are you?", "Greet me."]) {
    await ask(question);
    await idle();
  }
  seen.dropped = (await notes.allInnerTexts()).filter((note) => note.includes("left out"));
  await screenshot("4-context");
  await clear();
}

async function tooLong() {
  await box.fill("x".repeat(8001));
  const hint = page.locator("#fathom-length");
  await until("a hint", async () => (await hint.innerText()) !== "");
  await box.press("Enter");
  await sleep(1000);
  seen.tooLong = { hint: await hint.innerText(), length: (await box.inputValue()).length, questions: await questions.count() };
  await box.fill("");
  await until("no hint", async () => (await hint.innerText()) === "");
}

async function looks() {
  await ask("Greet me.");
  await idle();
  seen.overflows = {};
  for (const [name, width, height] of [["desktop", 1100, 800], ["phone", 390, 780]]) {
    await page.setViewportSize({ width, height });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await sleep(500);
      seen.overflows[`${name} ${colorScheme}`] = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      await screenshot(`5-${name}-${colorScheme}`);
    }
  }
  await settings(true);
  await page.getByLabel("Seed").scrollIntoViewIfNeeded();
  seen.seed = await page.getByLabel("Seed").isVisible();
  await screenshot("8-settings");
  await settings(false);
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1100, height: 800 });
  await clear();
}

async function sideBySide() {
  await set("Max. tokens", 60);
  await page.getByLabel("Side by side with").click();
  await page.getByRole("option", { name: "tiny/midtrain" }).click();
  const second = page.locator("#fathom-chat-1");
  await second.waitFor();
  await settings(false);
  await ask("Greet me.");
  await until("the other answer", async () => (await second.locator('[data-testid="bot"] .note').count()) >= 1);
  await idle();
  seen.sideBySide = {
    heading: await page.locator("h2").innerText(),
    first: await lastAnswer(),
    second: await second.locator('[data-testid="bot"]').last().evaluate(withoutNotes),
    question: await second.locator('[data-testid="user"]').last().innerText(),
  };
  await screenshot("9-side-by-side");
}

try {
  await main();
} catch (error) {
  seen.failure = String(error);
  await screenshot("failure").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen, null, 2));
