// Drives the panel at `url` like a newcomer and prints what it saw as one JSON object; screenshots go to `folder`.
// node panel.mjs URL FOLDER CHROMIUM PARTS TEXT; PARTS: names of `parts` below, with commas. TEXT: a file to train on.

import { createRequire } from "node:module";
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, folder, executablePath, names, text] = process.argv.slice(2);
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const WAIT = Number(process.env.FATHOM_WAIT ?? 900_000); // ms; a machine that is only busy takes less
const LOOKS = [["desktop", 1280, 800], ["phone", 390, 844]];
const SERIOUS = ["serious", "critical"];
const NAME = "letters";
const STEPS = "600";
const seen = { external: [], errors: [], faults: [] };
const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, reducedMotion: "reduce" });
const page = await context.newPage();
page.setDefaultTimeout(WAIT);
page.on("request", (request) => {
  const target = new URL(request.url());
  if (/^(http|ws)/.test(target.protocol) && target.host !== new URL(url).host) seen.external.push(request.url());
});
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const choose = async (place, name) => {
  await page.locator(`${place} input`).locator("visible=true").first().click();
  await page.getByRole("option", { name }).first().click();
};
const button = (name) => page.getByRole("button", { name, exact: true }).locator("visible=true");
const tab = (name) => page.getByRole("tab", { name, exact: true }).click();
const train = async () => { // its form is filled when it is opened
  await tab("Train");
  await until("the form", async () => (await page.locator("#panel-command textarea").inputValue()).includes("train.py"));
};
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

async function type(box, value) {
  await box.fill(value);
  await box.press("Tab");
}
const fill = (field, value) => type(own(field), value);

// A state in the table of jobs on the page of the first run, by stage.
const states = async () => {
  await page.locator("#panel-own-jobs table").first().waitFor();
  const rows = await page.locator("#panel-own-jobs table").first().locator("tr").allInnerTexts();
  return Object.fromEntries(rows.slice(1).map((row) => row.split("\t").slice(1, 3)));
};
const exactly = (name) => new RegExp(`^\\s*${name}\\s*$`);
const finished = (stage) => until(`the end of ${stage}`, async () => {
  const found = await states();
  if (found[stage] === "failed") throw new Error(`${stage} failed: ${await saw("#panel-own-jobs")}`);
  return found[stage] === "done";
});

// On the tab Train: no job is open any more.
const ended = () => until("the end of all jobs", async () => !/\b(queued|running|waits)\b/.test(await saw("#panel-queue")));

// Data: own text is sent and checked.
async function send() {
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
}

// The files of before are found under their name.
async function again() {
  await tab("Data");
  await choose("#panel-own-before", exactly(NAME));
  await until("the folder of the text", async () => (await own("texts").inputValue()).endsWith(`own/${NAME}/text`));
  seen.again = await own("texts").inputValue();
}

async function sizes() {
  await choose("#panel-own-model", exactly("d2"));
  for (const [field, value] of [["steps", STEPS], ["context", "64"], ["tokens", "512"], ["seed", "1"]]) {
    await fill(field, value);
  }
  await until("no mistake", async () => (await saw("#panel-own-wrong-steps")) === "");
}

// It is cut into tokens, the time is asked for.
async function tokenizer() {
  await sizes();
  await choose("#panel-own-vocabulary", exactly("512"));
  await button("Train the tokenizer").click();
  await finished("tokenizer");
  await page.locator("#panel-own-tokenizer").getByText("The tokenizer is ready").waitFor();
  seen.tokenizer = await saw("#panel-own-tokenizer");
  await button("How long will this take?").click();
  await page.locator("#panel-own-time .block").waitFor();
  seen.time = await saw("#panel-own-time");
}

// The training starts, is watched and paused.
async function pause() {
  await button("Start the training").click();
  await page.locator("#panel-own-jobs svg").first().waitFor();
  await until("its first steps", async () => /step [1-9]/.test(await saw("#panel-own-jobs")));
  seen.watched = await saw("#panel-own-jobs");
  await train();
  await choose("#panel-job", /running/);
  await button("Pause").click();
  await until("the pause", async () => (await saw("#panel-job-page h3")).endsWith("paused"));
  seen.paused = await saw("#panel-queue");
  await page.locator("#panel-machine").getByText("CPU").first().waitFor();
  seen.machine = await saw("#panel-machine");
}

// After the server was killed the job goes on.
async function resume() {
  await page.locator("#panel-own-jobs").getByText("paused").first().waitFor();
  await sizes();
  await train();
  await choose("#panel-job", /paused/);
  await button("Resume").click();
  await until("a job that runs", async () => (await saw("#panel-job-page h3")).endsWith("running"));
}

// The same with a second seed waits behind it; its keys are found by search in the form of Train.
async function second() {
  await tab("Data");
  await button("Take this into the form of Train").click();
  await train();
  const command = page.locator("#panel-command textarea");
  const search = page.getByLabel("Search keys");
  await until("the form", async () => (await command.inputValue()).includes("seed=1"));
  const changes = [
    ["run", `${NAME}-2`, "name of the chain"],
    ["init_from", `${NAME}/tokenizer`, "init_from"],
    ["seed", "2", "seed of initial weights"],
  ];
  for (const [key, value, words] of changes) {
    await search.fill(words);
    await until(`the keys with ${words}`, async () => {
      const found = await page.locator('[id^="panel-key-"]').locator("visible=true").allInnerTexts();
      return found.length > 0 && found.every((box) => box.includes(words));
    });
    const label = new RegExp(`^\\s*${key}( \\(default .*\\))?\\s*$`);
    const box = page.locator('[id^="panel-key-"]').filter({ has: page.getByText(label) }).locator("textarea, input");
    if (key === "seed") {
      await box.locator("visible=true").first().fill(value);
      break; // the click on Start leaves the box
    }
    await type(box.locator("visible=true").first(), value);
    await until(`${key} in the command`, async () => (await command.inputValue()).includes(`${key}=${value}`));
  }
  await button("Start").click();
  await until("seed in the command", async () => (await command.inputValue()).includes("seed=2"));
  seen.command = await command.inputValue();
  await until("the second job in the queue", async () => (await saw("#panel-queue")).includes(`${NAME}-2`));
  await ended();
  seen.queue = await saw("#panel-queue");
  await screenshot("queue");
  await tab("Data");
  await finished("pretrain");
  await page.locator("#panel-own-jobs").getByText("And then").waitFor();
  seen.commands = await page.locator("#panel-own-jobs code").allInnerTexts();
  await screenshot("after");
}

const PAIR = [`${NAME}/pretrain`, `${NAME}-2/pretrain`];

async function compare() {
  await tab("Compare");
  for (const name of PAIR) await choose("#panel-stages", exactly(name));
  await page.keyboard.press("Escape");
  await page.locator("#panel-comparison svg").first().waitFor();
  await until("two curves", async () => {
    const shown = await saw("#panel-comparison");
    return PAIR.every((name) => shown.includes(name));
  });
  seen.compared = await saw("#panel-comparison");
  await page.getByLabel("A: runs of the baseline").fill(NAME);
  await page.getByLabel("B: runs with the change").fill(`${NAME}-2`);
  await button("Compare").click();
  await page.locator("#panel-verdict .verdict, #panel-verdict .problem").first().waitFor();
  seen.verdict = await saw("#panel-verdict");
  await screenshot("compare");
}

async function evaluate() {
  await tab("Evaluate");
  for (const name of PAIR) await choose("#panel-evaluated", exactly(name));
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "Evaluate the chosen stages" }).click();
  await page.getByRole("checkbox", { name: "chat", exact: true }).uncheck();
  await type(page.getByLabel("eval.tokens"), "4096");
  await button("Start").click();
  await until("the first job's end", async () => (await saw("#panel-eval-job h3")).endsWith("done"));
  await train();
  await ended();
  await tab("Evaluate");
  await until("scores of both", async () => /bpb\s+[\d.]+\s+[\d.]+/.test(await saw("#panel-scores")));
  seen.scores = await saw("#panel-scores");
  await screenshot("evaluate");
}

async function exported() {
  await tab("Runs");
  await until("both runs in the table", async () => {
    const table = await saw("#panel-table");
    return table.includes(PAIR[1]) && !/interrupted|running/.test(table);
  });
  await choose("#panel-open", exactly(PAIR[0]));
  await page.locator("#panel-run svg").first().waitFor();
  seen.run = await saw("#panel-run");
  await page.getByRole("button", { name: /^Export/ }).click();
  await button("Start the export").click();
  await until("the end of the export", async () => (await saw("#panel-exported h3")).endsWith("done"));
  seen.exported = await saw("#panel-exported");
  await screenshot("run");
}

// Both stages answer in the panel itself.
async function ask() {
  await tab("Compare");
  await page.getByRole("button", { name: "Answers of two stages" }).click();
  await choose("#panel-one", exactly(PAIR[0]));
  await choose("#panel-other", exactly(PAIR[1]));
  await page.getByLabel("Question, or text for a base model to continue").fill("the");
  await button("Ask both").click();
  await until("two answers", async () => (await page.locator("#panel-answers .side").count()) === 2);
  seen.answers = await page.locator("#panel-answers .side").allInnerTexts();
}

// The chat beside the panel.
async function chat() {
  const box = page.locator("#fathom-question textarea");
  await box.fill("the");
  await box.press("Enter");
  await until("an answer", async () => (await page.locator('[data-testid="bot"] .note').count()) > 0);
  seen.answer = await page.locator('[data-testid="bot"]').last().innerText();
  await screenshot("chat");
}

// Every tab in four looks, with the serious faults that axe-core finds.
async function look() {
  const tabs = await page.getByRole("tab").locator("visible=true").allInnerTexts();
  tabs.splice(tabs.indexOf("Data") + 1, 0, "Training rows", "Tokens"); // tabs inside that one
  seen.overflows = {};
  seen.looks = 0;
  for (const name of tabs) {
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
  seen.tabs = tabs;
}

// A tab with something in it.
async function open(name) {
  if (name === "Runs") {
    await choose("#panel-open", /pretrain/);
    await page.locator("#panel-run svg").first().waitFor();
  }
  if (name === "Tokens") {
    await choose("#panel-tokenizer", /tokenizer/);
    await page.locator("#panel-tokens-0 .token").first().waitFor();
  }
  if (name === "Compare") {
    await choose("#panel-stages", /pretrain/);
    await page.keyboard.press("Escape");
    await page.locator("#panel-comparison svg").first().waitFor();
  }
}

const parts = { send, again, tokenizer, pause, resume, second, compare, evaluate, exported, ask, look, chat };
try {
  if (names.includes("look")) await page.addInitScript({ path: createRequire(import.meta.url).resolve("axe-core/axe.min.js") });
  await page.goto(url);
  if (names !== "chat") await page.getByRole("tab", { name: "Runs", exact: true }).waitFor();
  for (const name of names.split(",")) {
    console.error(`${new Date().toISOString()} ${name}`);
    await parts[name]();
  }
} catch (error) {
  seen.failure = String(error);
  await screenshot("failure").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen, null, 2));
