//! `start`, `stop`, `restart`, `pause`, `resume`, `delete`, `rename`: several names at once, each failure with its name.

use serde_json::{Value, json};

use super::completion::complete;
use crate::{
    client::{About, Client, Instance, Kind, Url, operation::for_each},
    context::Context,
    error::{Error, Result},
};

/// Names, or all that there are.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Names {
    /// Instances
    #[arg(value_name = "INSTANCE", conflicts_with = "all", add = complete(Kind::Instance))]
    names: Vec<String>,
    /// All instances of the project
    #[arg(long)]
    all: bool,
}

/// Options of `pause` and `resume`.
#[derive(Debug, clap::Args)]
pub struct Freeze {
    #[command(flatten)]
    names: Names,
}

/// Options of `start`.
#[derive(Debug, clap::Args)]
pub struct Start {
    #[command(flatten)]
    names: Names,
    /// Attach to the console of the (single) instance
    #[arg(long)]
    console: bool,
}

/// Options of `stop` and `restart`.
#[derive(Debug, clap::Args)]
pub struct Stop {
    #[command(flatten)]
    names: Names,
    /// Without asking the guest
    #[arg(short, long)]
    force: bool,
    /// Seconds that the guest is given; -1 is for ever
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    timeout: Option<i64>,
}

/// Options of `delete`.
#[derive(Debug, clap::Args)]
pub struct Delete {
    #[command(flatten)]
    names: Names,
    /// Also running ones
    #[arg(short, long)]
    force: bool,
    /// Ask before each
    #[arg(short, long)]
    interactive: bool,
}

/// Options of `rename`.
#[derive(Debug, clap::Args)]
pub struct Rename {
    /// Instance, or INSTANCE/SNAPSHOT
    #[arg(add = complete(Kind::Instance))]
    name: String,
    /// Its new name
    new_name: String,
}

/// A change of state, named as the API does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Boot.
    Start,
    /// Shut down.
    Stop,
    /// Shut down and boot.
    Restart,
    /// Stop the clock of all its processes.
    Freeze,
    /// Undo of freeze.
    Unfreeze,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Freeze => "freeze",
            Self::Unfreeze => "unfreeze",
        }
    }

    fn doing(self) -> &'static str {
        match self {
            Self::Start => "starting",
            Self::Stop => "stopping",
            Self::Restart => "restarting",
            Self::Freeze => "pausing",
            Self::Unfreeze => "resuming",
        }
    }

    /// Whether the action means anything for an instance in this state; used with `--all` only.
    fn concerns(self, status: &str) -> bool {
        match self {
            Self::Start => status == "Stopped",
            // What an error halted tries again what failed.
            Self::Unfreeze => matches!(status, "Frozen" | "Error"),
            Self::Freeze | Self::Restart => status == "Running",
            Self::Stop => status != "Stopped",
        }
    }
}

impl Names {
    /// The names meant; with `--all` those that `filter` lets through.
    async fn resolve(self, client: &Client, filter: impl Fn(&Instance) -> bool) -> Result<Vec<String>> {
        if !self.all {
            return Ok(self.names);
        }
        let instances: Vec<Instance> = client.get_as(&Url::new(&["instances"]).with("recursion", 1)).await?;
        Ok(instances.into_iter().filter(filter).map(|instance| instance.name).collect())
    }
}

impl Start {
    /// Starts.
    pub async fn run(self, context: &Context) -> Result<()> {
        if self.console && (self.names.all || self.names.names.len() != 1) {
            return Err(Error::Usage("--console works with one instance only".to_owned()));
        }
        let names = change_states(context, self.names, Action::Start).await?;
        match names.as_slice() {
            [name] if self.console => super::console::attach(context, name, false).await,
            _ => Ok(()),
        }
    }
}

impl Freeze {
    /// Freezes, or undoes it.
    pub async fn run(self, context: &Context, action: Action) -> Result<()> {
        change_states(context, self.names, action).await.map(drop)
    }
}

impl Stop {
    /// Changes the state.
    pub async fn run(self, context: &Context, action: Action) -> Result<()> {
        let names = self.names.resolve(&context.client, |instance| action.concerns(&instance.status)).await?;
        let body =
            json!({"action": action.name(), "force": self.force, "timeout": self.timeout.unwrap_or(-1)});
        for_each(&names, |name| change_state(context, name, body.clone(), action.doing())).await
    }
}

impl Delete {
    /// Deletes instances, and snapshots written as `INSTANCE/SNAPSHOT`.
    pub async fn run(self, context: &Context) -> Result<()> {
        let (force, interactive) = (self.force, self.interactive);
        let mut names = self.names.resolve(&context.client, |_| true).await?;
        if interactive {
            let mut kept = Vec::new();
            for name in names {
                if confirm(&format!("delete {name}"))? {
                    kept.push(name);
                }
            }
            names = kept;
            if names.is_empty() {
                return Ok(());
            }
        }
        for_each(&names, |name| async move {
            let deleted =
                if force { force_delete(context, &name).await } else { delete(context, &name).await };
            deleted.about(&context.client, Kind::Instance, &name)
        })
        .await
    }
}

impl Rename {
    /// Renames an instance or snapshot.
    pub async fn run(self, context: &Context) -> Result<()> {
        let new_name = match (self.name.split_once('/'), self.new_name.split_once('/')) {
            (Some((instance, _)), Some((other, snapshot))) if instance == other => snapshot,
            (None, None) | (Some(_), None) => self.new_name.as_str(),
            _ => return Err(Error::Usage("a snapshot stays with its instance".to_owned())),
        };
        let work = async {
            let answer = context.client.post(&instance_url(&self.name), &json!({"name": new_name})).await?;
            context.finish(answer, format!("renaming {}", self.name)).await
        };
        work.await.about(&context.client, Kind::Instance, &self.name).map(drop)
    }
}

/// The path of an instance, or of a snapshot written as `INSTANCE/SNAPSHOT`.
pub fn instance_url(name: &str) -> Url {
    match name.split_once('/') {
        Some((instance, snapshot)) => Url::new(&["instances", instance, "snapshots", snapshot]),
        None => Url::new(&["instances", name]),
    }
}

/// The plain change of state for all names that are meant.
async fn change_states(context: &Context, names: Names, action: Action) -> Result<Vec<String>> {
    let names = names.resolve(&context.client, |instance| action.concerns(&instance.status)).await?;
    for_each(&names, |name| change_state(context, name, json!({"action": action.name()}), action.doing()))
        .await?;
    Ok(names)
}

/// Asks for the change and waits until it is done.
async fn change_state(context: &Context, name: String, body: Value, doing: &str) -> Result<()> {
    let url = Url::new(&["instances", &name, "state"]);
    let work = async {
        let answer = context.client.change(hyper::Method::PUT, &url, &body, None).await?;
        context.finish(answer, format!("{doing} {name}")).await
    };
    work.await.about(&context.client, Kind::Instance, &name).map(drop)
}

async fn delete(context: &Context, name: &str) -> Result<()> {
    let answer = context.client.delete(&instance_url(name)).await?;
    context.finish(answer, format!("deleting {name}")).await.map(drop)
}

/// Stops it first where that is needed.
async fn force_delete(context: &Context, name: &str) -> Result<()> {
    if !name.contains('/') {
        let instance: Instance = context.client.get_as(&instance_url(name)).await?;
        if instance.status != "Stopped" {
            let stop = json!({"action": "stop", "force": true, "timeout": -1});
            let stopped = change_state(context, name.to_owned(), stop, "stopping").await;
            // It may have stopped by itself meanwhile; whether it can be deleted, the deletion says.
            if let Err(error @ (Error::Interrupted(_) | Error::Unreachable(_))) = stopped {
                return Err(error);
            }
            return match delete(context, name).await {
                Err(error) if error.is_not_found() && instance.ephemeral => Ok(()),
                Err(error) if error.is_not_found() => Err(error),
                Err(error) => Err(stopped.err().unwrap_or(error)),
                Ok(()) => Ok(()),
            };
        }
    }
    delete(context, name).await
}

/// Asks a question on the terminal; anything but yes is no.
fn confirm(question: &str) -> Result<bool> {
    use std::io::Write as _;
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "{question}? (yes/no) [no] ");
    let _ = stderr.flush();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes"))
}
