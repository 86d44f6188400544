//! `log`: what the server keeps of an instance's run, and of programs whose output was to be kept.

use hyper::{HeaderMap, Method};
use serde_json::Value;

use super::completion::{Below, complete, complete_below};
use crate::{
    client::{About, Client, Kind, Url, empty, operation::for_each, url::last_segment},
    context::Context,
    error::Result,
    output,
};

/// Directory of what programs printed.
const OUTPUTS: &str = "exec-output";

/// `log ...`
#[derive(Debug, clap::Subcommand)]
pub enum Log {
    /// List the logs of an instance
    #[command(visible_alias = "ls")]
    List {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
    /// Print a log
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Log, as list names it
        #[arg(add = complete_below(Below::Log))]
        log: String,
    },
    /// Delete logs; that of the instance itself begins anew
    #[command(visible_alias = "rm")]
    Delete {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Logs, as list names them
        #[arg(required = true, add = complete_below(Below::Log))]
        logs: Vec<String>,
    },
}

fn logs(instance: &str) -> Url {
    Url::new(&["instances", instance, "logs"])
}

/// The path of a log as `list` names it.
fn place(instance: &str, name: &str) -> Url {
    match name.strip_prefix(OUTPUTS).and_then(|rest| rest.strip_prefix('/')) {
        Some(name) => logs(instance).join(OUTPUTS).join(name),
        None => logs(instance).join(name),
    }
}

async fn names(client: &Client, instance: &str) -> Result<Vec<String>> {
    let own = logs(instance);
    let outputs = own.clone().join(OUTPUTS);
    let (own, outputs) = tokio::try_join!(client.get(&own), client.get(&outputs))?;
    let names = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(last_segment).collect()
    };
    let mut all = names(&own.metadata);
    all.extend(names(&outputs.metadata).into_iter().map(|name| format!("{OUTPUTS}/{name}")));
    Ok(all)
}

impl Log {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { instance } => {
                for name in names(client, &instance).await.about(client, Kind::Instance, &instance)? {
                    output::line(&name)?;
                }
                Ok(())
            }
            Self::Show { instance, log } => {
                let url = place(&instance, &log);
                let work = async {
                    let response = client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
                    client.bytes(response).await
                };
                output::write(&work.await.about(client, Kind::Instance, &instance)?)
            }
            Self::Delete { instance, logs } => {
                for_each(&logs, |log| {
                    let url = place(&instance, &log);
                    async move { client.delete(&url).await.map(drop) }
                })
                .await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_and_outputs() {
        assert_eq!(place("c1", "lxc.log").render(None), "/1.0/instances/c1/logs/lxc.log");
        assert_eq!(
            place("c1", "exec-output/x.stdout").render(None),
            "/1.0/instances/c1/logs/exec-output/x.stdout"
        );
        assert_eq!(place("c1", "../x").render(None), "/1.0/instances/c1/logs/..%2Fx");
    }
}
