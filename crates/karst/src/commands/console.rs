//! `console`: attached until ctrl-a q, or its log.

use hyper::{HeaderMap, Method};
use serde_json::json;

use super::{
    completion::complete,
    session::{self, End, Pump},
};
use crate::{
    client::{About, Kind, Url, empty},
    context::Context,
    error::{Error, Result},
    output,
    terminal::{self, RawMode, Target, Writer},
};

/// Options of `console`.
#[derive(Debug, clap::Args)]
pub struct Console {
    /// Instance
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Print what the console has shown so far
    #[arg(long)]
    show_log: bool,
    /// Take the console from whoever is attached
    #[arg(short, long, conflicts_with_all = ["show_log", "clear_log"])]
    force: bool,
    /// The port of a virtual machine in its place: a device of type port
    #[arg(short, long, value_name = "DEVICE", conflicts_with_all = ["show_log", "clear_log"])]
    port: Option<String>,
    /// Forget what the console has shown so far; with --show-log after printing it
    #[arg(long)]
    clear_log: bool,
}

impl Console {
    /// Attaches or prints.
    pub async fn run(self, context: &Context) -> Result<()> {
        if !self.show_log && !self.clear_log {
            return attach_to(context, &self.instance, self.port.as_deref(), self.force).await;
        }
        if self.show_log {
            show_log(context, &self.instance).await?;
        }
        if self.clear_log {
            clear_log(context, &self.instance).await?;
        }
        Ok(())
    }
}

/// Empties the console's log.
async fn clear_log(context: &Context, instance: &str) -> Result<()> {
    let url = Url::new(&["instances", instance, "console"]);
    context.client.delete(&url).await.about(&context.client, Kind::Instance, instance).map(drop)
}

/// Prints the console's log.
pub async fn show_log(context: &Context, instance: &str) -> Result<()> {
    let url = Url::new(&["instances", instance, "console"]);
    let work = async {
        let response = context.client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
        context.client.bytes(response).await
    };
    output::write(&work.await.about(&context.client, Kind::Instance, instance)?)
}

/// Attaches until the user detaches or the console ends.
pub async fn attach(context: &Context, instance: &str, force: bool) -> Result<()> {
    attach_to(context, instance, None, force).await
}

async fn attach_to(context: &Context, instance: &str, port: Option<&str>, force: bool) -> Result<()> {
    let client = &context.client;
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let mut body = json!({"type": "console", "width": columns, "height": rows, "force": force});
    if let Some(port) = port {
        body["port"] = port.into();
    }
    let url = Url::new(&["instances", instance, "console"]);
    let answer = client.post(&url, &body).await.about(client, Kind::Instance, instance)?;
    let operation =
        answer.operation.ok_or_else(|| Error::local("the server's answer to console is no operation"))?;
    let (data, control) =
        tokio::try_join!(client.stream(&operation, "0"), client.stream(&operation, "control"))?;
    if !context.quiet && terminal::is_terminal(rustix::stdio::stdin()) {
        crate::error::report_line("attached; ctrl-a q detaches");
    }
    let end = {
        let _raw = RawMode::enter()?;
        let _control = session::control(control, true, true)?;
        let pump = Pump {
            input: Some(terminal::read_stdin()),
            output: Some(Writer::new(Target::Stdout)),
            tell_end: false,
            escape: true,
        };
        pump.run(data).await
    };
    // Leaves the line that the guest was writing.
    if terminal::is_terminal(rustix::stdio::stdout()) {
        output::line("\r")?;
    }
    match end {
        End::Detached | End::OutputClosed => Ok(()),
        End::Eof => {
            match tokio::time::timeout(std::time::Duration::from_secs(2), client.wait_final(&operation.id))
                .await
            {
                Ok(Ok(operation)) if !operation.is_success() => {
                    crate::client::operation::outcome(operation).map(drop)
                }
                _ => Ok(()),
            }
        }
    }
}
