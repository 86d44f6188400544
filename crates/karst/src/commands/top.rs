//! `top`: instances by what they use, and what one used over time.
//!
//! The server tells counters; two answers make a rate. It samples guests at most every two seconds, so answers that are closer
//! than that may be of one sample.

use std::{cmp::Ordering, collections::HashMap, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::completion::complete;
use crate::{
    client::{About, Client, Kind, Url},
    context::Context,
    error::{Error, Result},
    output::{
        self,
        table::{Format, FormatOption, List, Style},
        units,
    },
    terminal,
};

/// Age that the server's sample may have; after it there is a new one.
const SAMPLE: Duration = Duration::from_millis(2100);
/// To the upper left corner; from there on nothing is left of before.
const HOME: &str = "\x1b[H";
const CLEAR: &str = "\x1b[J";

/// Options of `top`.
#[derive(Debug, clap::Args)]
pub struct Top {
    /// Only this instance
    #[arg(add = complete(Kind::Instance))]
    instance: Option<String>,
    /// What comes first
    #[arg(short, long, value_enum, default_value_t = Sort::Cpu)]
    sort: Sort,
    /// Instances of all projects
    #[arg(long, visible_alias = "all", conflicts_with = "instance")]
    all_projects: bool,
    /// Once, not again and again; so it is for anything but a terminal
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value_t = 3,
        value_parser = clap::value_parser!(u64).range(2..=3600))]
    delay: u64,
    /// What the instance used over the last hour, day or month
    #[arg(long, value_enum, value_name = "SPAN", num_args = 0..=1, default_missing_value = "hour",
        requires = "instance", conflicts_with_all = ["once", "delay", "sort"])]
    history: Option<Span>,
    #[command(flatten)]
    format: FormatOption,
}

/// An order: the greatest first, names from A to Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// CPU time.
    Cpu,
    /// Memory in use.
    Memory,
    /// Bytes from and to disks.
    Disk,
    /// Bytes from and to networks.
    Network,
    /// Project and name.
    Name,
}

/// A time that averages are kept for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Span {
    /// By minutes.
    Hour,
    /// By ten minutes.
    Day,
    /// By hours.
    Month,
}

impl Span {
    fn seconds(self) -> u32 {
        match self {
            Self::Hour => 60,
            Self::Day => 600,
            Self::Month => 3600,
        }
    }
}

/// Which instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
struct Named {
    name: String,
    project: String,
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// What it has and moves, in bytes: since its start, or by second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
struct Amounts {
    memory: Option<u64>,
    memory_total: Option<u64>,
    disk_read: Option<u64>,
    disk_written: Option<u64>,
    received: Option<u64>,
    sent: Option<u64>,
    processes: Option<u64>,
}

/// What the server tells of an instance: counters since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct Counted {
    #[serde(flatten)]
    of: Named,
    sampled_at: Option<i64>,
    cpu_ns: Option<u64>,
    #[serde(flatten)]
    amounts: Amounts,
}

/// What an instance uses; rates are by second, CPU in per cent of one.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
struct Use {
    #[serde(flatten)]
    of: Named,
    cpu_percent: Option<f64>,
    #[serde(flatten)]
    amounts: Amounts,
}

/// The last two different samples of instances, by project and name.
#[derive(Debug, Default)]
struct Watched(HashMap<(String, String), [Counted; 2]>);

impl Watched {
    /// Takes what the server tells now; answers what is used.
    fn take(&mut self, all: Vec<Counted>) -> Vec<Use> {
        let mut kept = HashMap::new();
        let mut uses = vec![];
        for now in all {
            let key = (now.of.project.clone(), now.of.name.clone());
            let pair = match self.0.remove(&key) {
                None => [now.clone(), now],
                // The same sample again.
                Some(old) if old[1].sampled_at == now.sampled_at => old,
                Some([_, last]) => [last, now],
            };
            uses.push(used(&pair[0], &pair[1]));
            kept.insert(key, pair);
        }
        self.0 = kept;
        uses
    }
}

fn used(before: &Counted, now: &Counted) -> Use {
    let span = before.sampled_at.zip(now.sampled_at).map(|(a, b)| b - a).filter(|ms| *ms > 0);
    // A counter that fell is that of another start.
    let rate = |old: Option<u64>, new: Option<u64>, unit: f64| -> Option<f64> {
        Some(new?.checked_sub(old?)? as f64 * unit / (span? as f64 / 1000.0))
    };
    let (old, new) = (&before.amounts, &now.amounts);
    let bytes = |of: fn(&Amounts) -> Option<u64>| rate(of(old), of(new), 1.0).map(|rate| rate.round() as u64);
    let cpu = rate(before.cpu_ns, now.cpu_ns, 100.0 / 1e9);
    Use {
        of: now.of.clone(),
        cpu_percent: cpu.map(|cpu| (cpu * 10.0).round() / 10.0),
        amounts: Amounts {
            disk_read: bytes(|a| a.disk_read),
            disk_written: bytes(|a| a.disk_written),
            received: bytes(|a| a.received),
            sent: bytes(|a| a.sent),
            ..new.clone()
        },
    }
}

fn sort(uses: &mut [Use], by: Sort) {
    let sum = |a: Option<u64>, b: Option<u64>| a.unwrap_or(0).saturating_add(b.unwrap_or(0));
    let disk = |u: &Use| sum(u.amounts.disk_read, u.amounts.disk_written);
    let network = |u: &Use| sum(u.amounts.received, u.amounts.sent);
    uses.sort_by(|a, b| {
        let greatest = match by {
            Sort::Cpu => {
                let of = |u: &Use| u.cpu_percent.unwrap_or(-1.0);
                of(b).total_cmp(&of(a))
            }
            Sort::Memory => b.amounts.memory.cmp(&a.amounts.memory),
            Sort::Disk => disk(b).cmp(&disk(a)),
            Sort::Network => network(b).cmp(&network(a)),
            Sort::Name => Ordering::Equal,
        };
        greatest.then_with(|| (&a.of.project, &a.of.name).cmp(&(&b.of.project, &b.of.name)))
    });
}

fn size(bytes: Option<u64>) -> String {
    bytes.map(units::bytes).unwrap_or_default()
}

fn list(uses: &[Use], all_projects: bool) -> Result<List> {
    let mut columns = vec![
        "NAME",
        "TYPE",
        "CPU%",
        "MEMORY",
        "OF",
        "READ/S",
        "WRITTEN/S",
        "RECEIVED/S",
        "SENT/S",
        "PROCESSES",
    ];
    if all_projects {
        columns.insert(0, "PROJECT");
    }
    let mut list = List::new(&columns, serde_json::to_value(uses).map_err(Error::local)?);
    for Use { of, cpu_percent, amounts } in uses {
        let mut row = vec![
            of.name.clone(),
            if of.kind == "virtual-machine" { "vm".to_owned() } else { of.kind.clone() },
            cpu_percent.map(|cpu| format!("{cpu:.1}")).unwrap_or_default(),
            size(amounts.memory),
            size(amounts.memory_total),
            size(amounts.disk_read),
            size(amounts.disk_written),
            size(amounts.received),
            size(amounts.sent),
            amounts.processes.map(|n| n.to_string()).unwrap_or_default(),
        ];
        if all_projects {
            row.insert(0, of.project.clone());
        }
        list.rows.push(row);
    }
    Ok(list)
}

impl Top {
    /// Shows it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        if let (Some(span), Some(name)) = (self.history, &self.instance) {
            return history(client, name, span, self.format.format).await;
        }
        let is_table = matches!(self.format.format.style, Style::Table | Style::Compact);
        let live = !self.once && is_table && terminal::is_terminal(rustix::stdio::stdout());
        let mut watched = Watched::default();
        watched.take(self.fetch(client).await?);
        tokio::time::sleep(SAMPLE).await;
        loop {
            let mut uses = watched.take(self.fetch(client).await?);
            sort(&mut uses, self.sort);
            if !live {
                return list(&uses, self.all_projects)?.print(self.format.format);
            }
            self.paint(&uses)?;
            tokio::time::sleep(Duration::from_secs(self.delay)).await;
        }
    }

    async fn fetch(&self, client: &Client) -> Result<Vec<Counted>> {
        let mut url = Url::new(&["karst", "top"]);
        if self.all_projects {
            url = url.with("all-projects", true);
        }
        let mut all: Vec<Counted> = client.get_as(&url).await?;
        if let Some(name) = &self.instance {
            all.retain(|counted| counted.of.name == *name);
            if all.is_empty() {
                // Whether it is not there, or does not run.
                let url = Url::new(&["instances", name]);
                client.get(&url).await.about(client, Kind::Instance, name)?;
                return Err(Error::local(format!("instance {name:?} does not run: it uses nothing")));
            }
        }
        Ok(all)
    }

    /// As many as the terminal has lines for, over what was there before.
    fn paint(&self, uses: &[Use]) -> Result<()> {
        let format = Format { style: Style::Compact, ..self.format.format };
        let text = list(uses, self.all_projects)?.render(format)?;
        let (columns, rows) = terminal::size().unwrap_or((80, 24));
        let fits = usize::from(rows).saturating_sub(1).max(1);
        let lines = text.lines().take(fits);
        // What is left of a longer line of before goes.
        let cut = lines.map(|line| line.chars().take(usize::from(columns)).collect::<String>() + "\x1b[K\n");
        output::print(&format!("{HOME}{}{CLEAR}", cut.collect::<String>()))
    }
}

/// Averages of a period, as the server tells them.
#[derive(Debug, Deserialize)]
struct Point {
    time: i64,
    cpu: Option<u64>,
    #[serde(flatten)]
    amounts: Amounts,
}

async fn history(client: &Client, name: &str, span: Span, format: Format) -> Result<()> {
    let url = Url::new(&["karst", "instances", name, "history"]).with("seconds", span.seconds());
    let answer = client.get(&url).await.about(client, Kind::Instance, name)?;
    past(&answer.metadata["series"][0]["points"])?.print(format)
}

fn past(points: &Value) -> Result<List> {
    let columns = ["TIME", "CPU%", "MEMORY", "READ/S", "WRITTEN/S", "RECEIVED/S", "SENT/S"];
    let mut list = List::new(&columns, points.clone());
    let points: Vec<Point> = crate::client::decode(points.clone())?;
    for p in points {
        let time = jiff::Timestamp::from_second(p.time).map(|t| t.to_string()).unwrap_or_default();
        list.rows.push(vec![
            units::time(&time),
            p.cpu.map(|cpu| format!("{:.1}", cpu as f64 / 10.0)).unwrap_or_default(),
            size(p.amounts.memory),
            size(p.amounts.disk_read),
            size(p.amounts.disk_written),
            size(p.amounts.received),
            size(p.amounts.sent),
        ]);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn counted(name: &str, at: i64, cpu_ns: u64, memory: u64, sent: Option<u64>) -> Counted {
        serde_json::from_value(
            json!({"name": name, "project": "default", "type": "container", "status": "Running",
            "sampled_at": at, "cpu_ns": cpu_ns, "memory": memory, "sent": sent}),
        )
        .unwrap()
    }

    #[test]
    fn two_samples_make_a_rate() {
        let mut watched = Watched::default();
        let first = watched.take(vec![counted("a", 1000, 0, 10, Some(0)), counted("b", 1000, 5, 20, None)]);
        assert!(first.iter().all(|u| u.cpu_percent.is_none() && u.amounts.memory.is_some()));
        let second =
            || vec![counted("a", 3000, 500_000_000, 10, Some(4096)), counted("b", 3000, 3, 20, None)];
        for _ in 0..2 {
            // Also when the server tells the same sample again.
            let uses = watched.take(second());
            assert_eq!((uses[0].cpu_percent, uses[0].amounts.sent), (Some(25.0), Some(2048)));
            assert_eq!((uses[1].cpu_percent, uses[1].amounts.sent), (None, None), "started anew");
        }
        let third = watched.take(vec![counted("b", 5000, 2_000_000_003, 20, None)]);
        assert_eq!((third.len(), third[0].cpu_percent), (1, Some(100.0)));
    }

    #[test]
    fn the_greatest_comes_first() {
        let of = |name: &str, cpu: Option<f64>, memory: u64, sent: Option<u64>| Use {
            of: Named { name: name.into(), ..Named::default() },
            cpu_percent: cpu,
            amounts: Amounts { memory: Some(memory), sent, ..Amounts::default() },
        };
        let mut uses = vec![
            of("idle", Some(0.0), 5, Some(9)),
            of("busy", Some(90.0), 1, None),
            of("alike", Some(0.0), 9, Some(1)),
            of("new", None, 3, Some(100)),
        ];
        let mut order = |by| {
            sort(&mut uses, by);
            uses.iter().map(|u| u.of.name.clone()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(order(Sort::Cpu), "busy alike idle new");
        assert_eq!(order(Sort::Memory), "alike idle new busy");
        assert_eq!(order(Sort::Network), "new idle alike busy");
        assert_eq!(order(Sort::Name), "alike busy idle new");
        assert_eq!(order(Sort::Disk), "alike busy idle new");
    }

    #[test]
    fn lists_are_for_people_and_programs() {
        let mut watched = Watched::default();
        watched.take(vec![counted("a", 1000, 0, 3 << 20, Some(0))]);
        let uses = watched.take(vec![counted("a", 2000, 30_000_000, 3 << 20, Some(2048))]);
        let csv = Format { style: Style::Csv, header: false };
        assert_eq!(
            list(&uses, false).unwrap().render(csv).unwrap(),
            "a,container,3.0,3.00MiB,,,,,2.00KiB,\n"
        );
        assert!(list(&uses, true).unwrap().render(csv).unwrap().starts_with("default,a,"));
        let json = Format { style: Style::Json, header: false };
        let json: Value = serde_json::from_str(&list(&uses, false).unwrap().render(json).unwrap()).unwrap();
        assert_eq!(
            (&json[0]["cpu_percent"], &json[0]["sent"], &json[0]["disk_read"]),
            (&json!(3.0), &json!(2048), &json!(null))
        );
        let points = json!([{"time": 0, "measured_ms": 1, "cpu": 1500, "memory": 1024}]);
        assert_eq!(past(&points).unwrap().render(csv).unwrap(), ",150.0,1.00KiB,,,,\n");
    }
}
