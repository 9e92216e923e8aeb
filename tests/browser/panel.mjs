// Drives the panel at `url` like a newcomer and prints what it saw as one JSON object; screenshots go to `folder`.
// node panel.mjs URL FOLDER CHROMIUM PART TEXT; PART: begin, resume, chat or look. TEXT: a file with text to train on.

import { createRequire } from "node:module";
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, folder, executablePath, part, text] = process.argv.slice(2);
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const WAIT = 900_000; // ms; a machine that is only busy takes less
const LOOKS = [["desktop", 1280, 800], ["phone", 390, 844]];
const SERIOUS = ["serious", "critical"];
const NAME = "letters";
const seen = { external: [], errors: [], faults: [] };
const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
const page = await context.newPage();
page.setDefaultTimeout(WAIT);
page.on("request", (request) => {
  const target = new URL(request.url());
  if (/^(http|ws)/.test(target.protocol) && target.host !== new URL(url).host) seen.external.push(request.url());
});
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const button = (name) => page.getByRole("button", { name, exact: true }).locator("visible=true");
const tab = (name) => page.getByRole("tab", { name, exact: true }).click();
const own = (field) => page.locator(`#panel-own-${field} input, #panel-own-${field} textarea`).locator("visible=true").first();
const saw = (place) => page.locator(place).innerText();
const screenshot = (name) => page.screenshot({ path: `${folder}/panel-${name}.png`, fullPage: true });

async function until(what, condition) {
  const start = Date.now();
  while (!(await condition())) {
    const wrong = await page.locator(".toast-body.error").allInnerTexts();
    if (wrong.length || Date.now() - start > WAIT) {
      throw new Error(`waited in vain for ${what}; ${wrong.join()}; page says: ${await page.innerText("body")}`);
    }
    await sleep(200);
  }
}

async function fill(field, value) {
  await own(field).fill(value);
  await own(field).press("Tab");
}

// A state in the table of jobs on the page of the first run, by stage.
const states = async () => {
  await page.locator("#panel-own-jobs table").first().waitFor();
  const rows = await page.locator("#panel-own-jobs table").first().locator("tr").allInnerTexts();
  return Object.fromEntries(rows.slice(1).map((row) => row.split("\t").slice(1, 3)));
};
const finished = (stage) => until(`the end of ${stage}`, async () => {
  const found = await states();
  if (found[stage] === "failed") throw new Error(`${stage} failed: ${await saw("#panel-own-jobs")}`);
  return found[stage] === "done";
});

// Data: own text is sent, checked, cut into tokens, the time is asked for, the training starts, is watched and paused.
async function begin() {
  await tab("Data");
  await fill("name", NAME);
  const upload = async (file) => {
    const chosen = page.waitForEvent("filechooser");
    await page.locator("#panel-own-text-files").click();
    await (await chosen).setFiles(file);
  };
  await upload({ name: "virus.exe", mimeType: "text/plain", buffer: Buffer.from("no text") });
  await page.locator("#panel-own-wrong-texts .problem").waitFor();
  seen.refused = await saw("#panel-own-wrong-texts");
  await upload({ name: "my text.txt", mimeType: "text/plain", buffer: await readFile(text) });
  await until("the folder of the text", async () => (await own("texts").inputValue()).endsWith(`own/${NAME}/text`));
  await button("Check the data").click();
  await page.locator("#panel-own-checked").getByText("is proposed below").waitFor();
  seen.checked = await saw("#panel-own-checked");
  await until("a smaller vocabulary", async () => (await own("vocabulary").inputValue()) === "512");

  await fill("steps", "-1");
  await page.locator("#panel-own-wrong-steps .problem").waitFor();
  seen.mistake = await saw("#panel-own-wrong-steps");
  await page.getByLabel("Model", { exact: false }).locator("visible=true").first().click();
  await page.getByRole("option", { name: "d2", exact: true }).click();
  for (const [field, value] of [["steps", "600"], ["context", "64"], ["tokens", "512"], ["seed", "1"]]) await fill(field, value);
  await until("no mistake", async () => (await saw("#panel-own-wrong-steps")) === "");

  await button("Train the tokenizer").click();
  await finished("tokenizer");
  await page.locator("#panel-own-tokenizer").getByText("The tokenizer is ready").waitFor();
  seen.tokenizer = await saw("#panel-own-tokenizer");
  await button("How long will this take?").click();
  await page.locator("#panel-own-time .block").waitFor();
  seen.time = await saw("#panel-own-time");
  await button("Start the training").click();
  await page.locator("#panel-own-jobs svg").first().waitFor();
  seen.watched = await saw("#panel-own-jobs progress").catch(() => "") + (await saw("#panel-own-jobs"));
  await screenshot("first-run");
  await tab("Train");
  await page.locator("#panel-machine").getByText("memory").waitFor();
  seen.machine = await saw("#panel-machine");
  await page.locator("#panel-job input").click();
  await page.getByRole("option", { name: /running/ }).click();
  await button("Pause").click();
  await page.locator("#panel-queue").getByText("paused").first().waitFor();
  await until("the worker's end", async () => !(await saw("#panel-job-page")).includes("running"));
  seen.paused = await saw("#panel-queue");
}

// After the server was killed: the page knows the run, the job goes on, a second seed follows, both are compared.
async function resume() {
  await tab("Data");
  await own("before").click();
  await page.getByRole("option", { name: NAME, exact: true }).click();
  await page.locator("#panel-own-jobs").getByText("paused").first().waitFor();
  seen.again = await own("texts").inputValue();
  await fill("context", "64");
  for (const [field, value] of [["steps", "600"], ["tokens", "512"]]) await fill(field, value);
  await page.getByLabel("Model", { exact: false }).locator("visible=true").first().click();
  await page.getByRole("option", { name: "d2", exact: true }).click();
  await button("Take this into the form of Train").click();
  await tab("Train");
  await page.getByLabel("Job", { exact: true }).click();
  await page.getByRole("option", { name: /paused/ }).click();
  await button("Resume").click();
  // The second seed waits behind the first; its keys are found by search.
  const values = [
    ["run", `${NAME}-2`, "name of the chain"], ["init_from", `${NAME}/tokenizer`, "init_from"], ["seed", "2", "seed of"],
  ];
  for (const [key, value, words] of values) {
    await page.getByLabel("Search keys").fill(words);
    await page.getByLabel("Search keys").press("Enter");
    const box = page.locator('[id^="panel-key-"]').locator("visible=true").filter({ hasText: new RegExp(`^\\s*${key}\\b`) }).first();
    await box.locator("textarea, input").first().fill(value);
    await box.locator("textarea, input").first().press("Tab");
    await until(`${key} in the command`, async () => (await page.locator("#panel-command textarea").inputValue()).includes(`${key}=${value}`));
  }
  seen.command = await page.locator("#panel-command textarea").inputValue();
  await button("Start").click();
  await until("two jobs at their end", async () => (await saw("#panel-queue")).split("done").length > 3);
  await screenshot("queue");
  await tab("Data");
  await finished("pretrain");
  await page.locator("#panel-own-jobs").getByText("And then").waitFor();
  seen.commands = await page.locator("#panel-own-jobs code").allInnerTexts();
  await screenshot("after");
  await tab("Compare");
  for (const name of [NAME, `${NAME}-2`]) {
    await page.locator("#panel-stages input").click();
    await page.getByRole("option", { name: `${name}/pretrain`, exact: true }).click();
  }
  await page.locator("#panel-comparison svg").first().waitFor();
  await until("two curves", async () => (await page.locator("#panel-comparison .chart").first().locator("li").count()) === 2);
  seen.compared = await saw("#panel-comparison");
  await page.getByLabel("A: runs of the baseline").fill(NAME);
  await page.getByLabel("B: runs with the change").fill(`${NAME}-2`);
  await button("Compare").click();
  await page.locator("#panel-verdict .verdict, #panel-verdict .problem").first().waitFor();
  seen.verdict = await saw("#panel-verdict");
  await screenshot("compare");
}

// The chat beside the panel.
async function chat() {
  const box = page.locator("#fathom-question textarea");
  await box.fill("the");
  await box.press("Enter");
  await page.locator("button.submit-button").waitFor();
  await until("an answer", async () => (await page.locator('[data-testid="bot"] .note').count()) > 0);
  seen.answer = await page.locator('[data-testid="bot"]').last().innerText();
  await screenshot("chat");
}

// Every tab in four looks, with the serious faults that axe-core finds.
async function look() {
  const names = await page.getByRole("tab").locator("visible=true").allInnerTexts();
  names.splice(names.indexOf("Data") + 1, 0, "Training rows", "Tokens"); // tabs inside that one
  seen.overflows = {};
  seen.looks = 0;
  for (const name of names) {
    await tab(name);
    await open(name);
    for (const [device, width, height] of LOOKS) {
      await page.setViewportSize({ width, height });
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        await sleep(700);
        const where = `${name}-${device}-${colorScheme}`;
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        if (wide > 0) seen.overflows[where] = wide;
        await screenshot(where);
        seen.looks += 1;
        const { violations } = await page.evaluate(() => axe.run());
        for (const fault of violations.filter((one) => SERIOUS.includes(one.impact))) {
          const nodes = fault.nodes.map((node) => `${node.html.slice(0, 160)} ${node.failureSummary}`);
          seen.faults.push({ where, rule: fault.id, count: nodes.length, nodes: nodes.slice(0, 4) });
        }
      }
    }
    await page.emulateMedia({ colorScheme: "light" });
    await page.setViewportSize({ width: 1280, height: 800 });
    await sleep(300);
  }
  seen.tabs = names;
}

// A tab with something in it.
async function open(name) {
  if (name === "Runs") {
    await page.locator("#panel-open input").click();
    await page.getByRole("option", { name: /pretrain/ }).first().click();
    await page.locator("#panel-run svg").first().waitFor();
  }
  if (name === "Tokens") {
    await page.locator("#panel-tokenizer input").click();
    await page.getByRole("option").first().click();
    await page.locator("#panel-tokens-0 .token").first().waitFor();
  }
  if (name === "Compare") {
    await page.locator("#panel-stages input").click();
    await page.getByRole("option", { name: /pretrain/ }).first().click();
    await page.keyboard.press("Escape");
    await page.locator("#panel-comparison svg").first().waitFor();
  }
}

try {
  if (part === "look") await page.addInitScript({ path: createRequire(import.meta.url).resolve("axe-core/axe.min.js") });
  await page.goto(url);
  if (part !== "chat") await page.getByRole("tab", { name: "Runs", exact: true }).waitFor();
  await { begin, resume, chat, look }[part]();
} catch (error) {
  seen.failure = String(error);
  await screenshot("failure").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen, null, 2));
