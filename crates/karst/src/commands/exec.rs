//! `exec` and `shell`. Round trips: one to ask, then the websockets and the wait for the end all at once.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{
    completion::complete,
    object::parse_pairs,
    session::{self, BROKEN_PIPE, End, Pump},
};
use crate::{
    client::{About, Client, Kind, Operation, Url},
    context::Context,
    error::{Error, Result, report_line},
    terminal::{self, RawMode, Target, Writer},
};

/// How long output may still come after the server has said that the command ended.
const DRAIN: Duration = Duration::from_secs(10);

/// Options of `exec`.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// Instance
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// The command and its arguments; "--" before it where an argument begins with "-"
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
    #[command(flatten)]
    how: How,
    /// An environment variable (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Directory to run in
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// User id to run as
    #[arg(long, value_name = "UID")]
    user: Option<u32>,
    /// Group id to run as
    #[arg(long, value_name = "GID")]
    group: Option<u32>,
    /// Nothing on its stdin
    #[arg(short = 'n', long)]
    disable_stdin: bool,
}

/// Whether the command gets a terminal.
#[derive(Debug, Clone, Copy, clap::Args)]
struct How {
    /// With a terminal (default when stdin and stdout are terminals)
    #[arg(short = 't', long, visible_alias = "force-interactive", conflicts_with = "no_terminal")]
    terminal: bool,
    /// Without a terminal: stdin, stdout and stderr apart
    #[arg(short = 'T', long, visible_alias = "force-noninteractive")]
    no_terminal: bool,
}

/// Options of `shell`.
#[derive(Debug, clap::Args)]
pub struct Shell {
    /// Instance
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// User to log in as
    #[arg(default_value = "root")]
    user: String,
}

/// What is run, and how.
struct Request {
    body: Map<String, Value>,
    terminal: bool,
    stdin: bool,
}

impl How {
    fn terminal(self) -> bool {
        let both = || {
            terminal::is_terminal(rustix::stdio::stdin()) && terminal::is_terminal(rustix::stdio::stdout())
        };
        self.terminal || (!self.no_terminal && both())
    }
}

impl Exec {
    /// Runs the command; its exit code becomes ours.
    pub async fn run(self, context: &Context) -> Result<()> {
        let terminal = self.how.terminal();
        let mut body = Map::new();
        body.insert("command".to_owned(), json!(self.command));
        let mut environment: Map<String, Value> = Map::new();
        if terminal && let Ok(term) = std::env::var("TERM") {
            environment.insert("TERM".to_owned(), json!(term));
        }
        environment.extend(parse_pairs(&self.env)?.into_iter().map(|(key, value)| (key, json!(value))));
        body.insert("environment".to_owned(), Value::Object(environment));
        if let Some(cwd) = self.cwd {
            body.insert("cwd".to_owned(), json!(cwd));
        }
        if let Some(user) = self.user {
            body.insert("user".to_owned(), json!(user));
        }
        if let Some(group) = self.group {
            body.insert("group".to_owned(), json!(group));
        }
        run(context, &self.instance, Request { body, terminal, stdin: !self.disable_stdin }).await
    }
}

impl Shell {
    /// Logs in.
    pub async fn run(self, context: &Context) -> Result<()> {
        let terminal = How { terminal: false, no_terminal: false }.terminal();
        let mut body = Map::new();
        body.insert("command".to_owned(), json!(["su", "-l", self.user]));
        let term = std::env::var("TERM").ok().filter(|_| terminal);
        body.insert("environment".to_owned(), term.map_or_else(|| json!({}), |term| json!({"TERM": term})));
        run(context, &self.instance, Request { body, terminal, stdin: true }).await
    }
}

/// Asks for the command and stays with it until its end.
async fn run(context: &Context, instance: &str, mut request: Request) -> Result<()> {
    let body = &mut request.body;
    body.insert("interactive".to_owned(), json!(request.terminal));
    body.insert("wait-for-websocket".to_owned(), json!(true));
    if request.terminal
        && let Some((columns, rows)) = terminal::size()
    {
        body.insert("width".to_owned(), json!(columns));
        body.insert("height".to_owned(), json!(rows));
    }
    let client = &context.client;
    let url = Url::new(&["instances", instance, "exec"]);
    let answer = client.post(&url, &Value::Object(request.body.clone())).await.about(
        client,
        Kind::Instance,
        instance,
    )?;
    let operation =
        answer.operation.ok_or_else(|| Error::local("the server's answer to exec is no operation"))?;
    let ended = if request.terminal {
        with_terminal(client, &operation, request.stdin).await?
    } else {
        with_pipes(client, &operation, request.stdin).await?
    };
    finish(&ended)
}

/// stdin, stdout and stderr of the command are ours, each for itself.
async fn with_pipes(client: &Client, operation: &Operation, stdin: bool) -> Result<Operation> {
    let connect = async {
        tokio::try_join!(
            client.stream(operation, "0"),
            client.stream(operation, "1"),
            client.stream(operation, "2"),
            client.stream(operation, "control")
        )
    };
    let streams = async {
        let (input, output, errors, control) = connect.await?;
        let control = session::control(control, true, false)?;
        let stdin = if stdin { terminal::read_stdin() } else { tokio::sync::mpsc::channel(1).1 };
        tokio::spawn(Pump { input: Some(stdin), tell_end: true, ..Pump::default() }.run(input));
        let copy = async |socket, target| {
            let pump = Pump { output: Some(Writer::new(target)), ..Pump::default() };
            if pump.run(socket).await == End::OutputClosed {
                // As a local command would get it.
                let _ = control.send(session::signal_message(BROKEN_PIPE)).await;
            }
        };
        tokio::join!(copy(output, Target::Stdout), copy(errors, Target::Stderr));
        Ok(())
    };
    until_end(client, &operation.id, streams).await
}

/// The command has a terminal, which ours becomes.
async fn with_terminal(client: &Client, operation: &Operation, stdin: bool) -> Result<Operation> {
    // Held to the end of this function: messages after it are for a terminal in its usual mode.
    let _raw = RawMode::enter()?;
    let streams = async {
        let (data, control) =
            tokio::try_join!(client.stream(operation, "0"), client.stream(operation, "control"))?;
        let _control = session::control(control, true, true)?;
        let input = stdin.then(terminal::read_stdin);
        Pump { input, output: Some(Writer::new(Target::Stdout)), ..Pump::default() }.run(data).await;
        Ok(())
    };
    until_end(client, &operation.id, streams).await
}

/// Runs the streams until the operation has ended and all output is here.
async fn until_end(
    client: &Client,
    id: &str,
    streams: impl Future<Output = Result<()>>,
) -> Result<Operation> {
    let ended = client.wait_final(id);
    tokio::pin!(ended, streams);
    tokio::select! {
        biased;
        streamed = &mut streams => match streamed {
            Ok(()) => ended.await,
            // A command that could not be started ends its operation before the streams stand: that says why.
            Err(error) => match tokio::time::timeout(DRAIN, ended).await {
                Ok(Ok(operation)) if !operation.is_success() => Ok(operation),
                _ => Err(error),
            },
        },
        ended = &mut ended => {
            let ended = ended?;
            // One that ran to its end and failed by its exit code has written all the same.
            if ended.is_success() || ended.metadata.get("return").is_some() {
                let _ = tokio::time::timeout(DRAIN, streams).await;
            }
            Ok(ended)
        }
    }
}

/// Passes the exit code on.
fn finish(ended: &Operation) -> Result<()> {
    let code = ended.metadata.get("return").and_then(Value::as_i64).and_then(|code| i32::try_from(code).ok());
    if !ended.is_success() {
        if ended.is_cancelled() {
            return Err(Error::Interrupted("cancelled".to_owned()));
        }
        report_line(&crate::error::one_line(if ended.err.is_empty() {
            "the command could not be run"
        } else {
            &ended.err
        }));
        return Err(Error::Exit(code.filter(|code| *code > 0).unwrap_or(1)));
    }
    match code {
        Some(0) => Ok(()),
        // Servers say -1 where they do not know.
        Some(code) => Err(Error::Exit(if code < 0 { 1 } else { code })),
        None => Err(Error::local("the server does not say how the command ended")),
    }
}
