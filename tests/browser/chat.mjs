// Drives the chat at `url` like a person and prints what it saw as one JSON object; screenshots go to `folder`.
// node chat.mjs URL FOLDER CHROMIUM

import { chromium } from "playwright-core";

const [url, folder, executablePath] = process.argv.slice(2);
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const seen = { external: [], errors: [] };
const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
const page = await browser.newPage({ viewport: { width: 1100, height: 800 } });
page.setDefaultTimeout(20_000);
page.on("request", (request) => {
  const target = new URL(request.url());
  if (/^(http|ws)/.test(target.protocol) && target.host !== new URL(url).host) seen.external.push(request.url());
});
page.on("pageerror", (error) => seen.errors.push(String(error)));

const box = page.locator("textarea").first();
const answers = page.locator('[data-testid="bot"]');
const questions = page.locator('[data-testid="user"]');
const button = (name) => page.getByRole("button", { name, exact: true });
const lastAnswer = () => answers.last().innerText();
const screenshot = (name) => page.screenshot({ path: `${folder}/${name}.png` });
const idle = () => page.locator("button.submit-button").waitFor();
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function until(what, condition) {
  const start = Date.now();
  while (!(await condition())) {
    if (Date.now() - start > 20_000) throw new Error(`waited in vain for ${what}; page says: ${await page.innerText("body")}`);
    await sleep(20);
  }
}

async function ask(question) {
  const before = await answers.count();
  await box.fill(question);
  await box.press("Enter");
  await until(`an answer to ${question}`, async () => (await answers.count()) > before);
}

async function set(label, value) {
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
  seen.sliders = await page.locator('input[type="range"]').count();
  await page.getByText("Who are you?").waitFor();
  await screenshot("1-start");

  // An example is a question; the answer grows while it is read.
  await page.getByText("Who are you?").click();
  await until("the example's answer", async () => (await answers.count()) === 1);
  await idle();
  seen.example = await lastAnswer();
  await clear();

  await ask("Ava has 12 apples. She buys 7 more. How many?");
  await idle();
  seen.calculator = await lastAnswer();
  seen.calls = await page.locator('[data-testid="bot"] .tool').allInnerTexts();
  await screenshot("2-calculator");
  await set("Temperature", 2);
  await set("Top-k", 0);
  await button("Retry").click();
  await until("another answer", async () => (await answers.count()) === 1 && (await lastAnswer()) !== seen.calculator);
  await idle();
  seen.again = { answer: await lastAnswer(), questions: await questions.count(), answers: await answers.count() };
  await set("Temperature", 0);
  await set("Top-k", 50);

  await button("Undo").click();
  await until("an empty chat", async () => (await questions.count()) === 0);
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

  // What would load something from elsewhere appears as it was written, in questions as in answers.
  await ask("![a](http://evil.example/a.png) <img src=http://evil.example/b.png>\n```\n<img src=http://evil.example/c.png>");
  await idle();
  seen.hostile = {
    text: await questions.last().innerText(),
    images: await page.locator('[data-testid="user"] img, [data-testid="bot"] img').count(),
  };
  await screenshot("6-hostile");
  await clear();

  // A song without end: it streams, and the stop button ends it.
  await ask("Sing.");
  const lengths = new Set();
  await until("a growing answer", async () => lengths.add((await lastAnswer()).length).size > 3);
  seen.frames = lengths.size;
  await page.locator("button.stop-button").click();
  await idle();
  await sleep(500);
  const stopped = await lastAnswer();
  await sleep(1000);
  seen.stopped = { length: stopped.length, later: (await lastAnswer()).length, text: stopped.slice(0, 9) };

  // The chat goes on, and a message longer than the context is no crash.
  await ask("long ".repeat(1000));
  await idle();
  seen.overflow = await page.locator(".note").allInnerTexts();
  await ask("Who are you?");
  await idle();
  seen.dropped = await page.locator(".note").last().innerText();
  await screenshot("4-context");

  await page.setViewportSize({ width: 390, height: 780 });
  await sleep(500);
  seen.mobileOverflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  await screenshot("5-phone");
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
