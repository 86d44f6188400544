//! The command line as a whole: global options, the tree of commands, usage errors in one line.

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind};

use crate::{
    commands::{
        access, admin, backup, completion, config, console, copy, create, debug, disk, display, exec, file,
        host, image, info, lifecycle, list, log, machine, man, monitor, network, operation, profile, project,
        publish, query, relocate, secret, snapshot, storage, top, trust, version, warning,
    },
    context::Context,
    error::{Error, Result},
};

/// The command line of Karst: virtual machines and containers
#[derive(Debug, Parser)]
#[command(
    name = "karst",
    version,
    propagate_version = false,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Directory of the server, with its unix.socket
    #[arg(long, global = true, env = "KARST_DIR", value_name = "DIR", help_heading = "Global options")]
    dir: Option<PathBuf>,
    /// Project to work in
    #[arg(long, global = true, env = "KARST_PROJECT", value_name = "NAME", help_heading = "Global options")]
    project: Option<String>,
    /// No progress and no remarks
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create and start an instance from an image
    Launch(create::Create),
    /// Create an instance from an image
    Create(create::Create),
    /// List instances
    #[command(visible_alias = "ls")]
    List(list::List),
    /// Instances by what they use, or what one used over time
    Top(top::Top),
    /// Show an instance, or the server when no name is given
    Info(info::Info),
    /// Run a command in an instance
    Exec(exec::Exec),
    /// A login shell in an instance
    Shell(exec::Shell),
    /// The console of an instance
    Console(console::Console),
    /// Start instances
    Start(lifecycle::Start),
    /// Stop instances
    Stop(lifecycle::Stop),
    /// Restart instances
    Restart(lifecycle::Stop),
    /// Logs of instances
    #[command(subcommand)]
    Log(log::Log),
    /// Look into virtual machines
    #[command(subcommand)]
    Debug(debug::Debug),
    /// Press the reset button of a virtual machine
    Reset(machine::Reset),
    /// Save what a virtual machine shows as a picture
    Screenshot(machine::Screenshot),
    /// Press keys of a virtual machine
    #[command(visible_alias = "sendkey")]
    SendKey(machine::SendKey),
    /// Layers of disks of virtual machines
    #[command(subcommand)]
    Disk(disk::Disk),
    /// Screens of virtual machines and their passwords
    #[command(subcommand)]
    Display(display::Display),
    /// Freeze instances
    Pause(lifecycle::Freeze),
    /// Let frozen instances go on
    Resume(lifecycle::Freeze),
    /// Delete instances or snapshots (INSTANCE/SNAPSHOT)
    #[command(visible_alias = "rm")]
    Delete(lifecycle::Delete),
    /// Copy an instance or one of its snapshots
    #[command(visible_alias = "cp")]
    Copy(copy::Copy),
    /// Move an instance to another pool, project or name
    #[command(visible_alias = "mv")]
    Move(relocate::Move),
    /// Rename an instance
    Rename(lifecycle::Rename),
    /// Let an instance begin anew from an image; name, configuration and snapshots stay
    Rebuild(publish::Rebuild),
    /// Make an image of an instance or of one of its snapshots
    Publish(publish::Publish),
    /// Write an instance with its snapshots to a file
    Export(backup::Export),
    /// Make an instance of the file that export has written
    Import(backup::Import),
    /// Backups of instances that the server keeps
    #[command(subcommand)]
    Backup(backup::Backup),
    /// Configuration of instances and of the server
    #[command(subcommand)]
    Config(config::Config),
    /// Snapshots of instances
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// Files in instances
    #[command(subcommand)]
    File(file::File),
    /// Images
    #[command(subcommand)]
    Image(image::Image),
    /// Networks
    #[command(subcommand)]
    Network(network::Network),
    /// Storage pools and volumes
    #[command(subcommand)]
    Storage(storage::Storage),
    /// Profiles
    #[command(subcommand)]
    Profile(profile::Profile),
    /// Projects
    #[command(subcommand)]
    Project(project::Project),
    /// Work going on in the server
    #[command(subcommand)]
    Operation(operation::Operation),
    /// Events as they happen
    Monitor(monitor::Monitor),
    /// Warnings of the server
    #[command(subcommand)]
    Warning(warning::Warning),
    /// Roles: who may do what, and why
    #[command(subcommand)]
    Access(access::Access),
    /// The server as a whole
    #[command(subcommand)]
    Admin(admin::Admin),
    /// Certificates that the server trusts
    #[command(subcommand)]
    Trust(trust::Trust),
    /// API tokens
    #[command(subcommand)]
    Token(access::Token),
    /// Secrets of projects, such as passphrases of encrypted volumes
    #[command(subcommand)]
    Secret(secret::Secret),
    /// The audit log
    #[command(subcommand)]
    Audit(access::Audit),
    /// The host below
    #[command(subcommand)]
    Host(host::Host),
    /// A request to the API as it is
    Query(query::Query),
    /// Versions of client and server
    Version,
    /// Print the completion script of a shell
    Completion(completion::Completion),
    /// Write the manual pages
    Man(man::Man),
}

/// Everything: arguments, runtime, command.
pub fn main() -> Result<()> {
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let cli = match Cli::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if let Command::Completion(completion) = cli.command {
        return completion.run();
    }
    if let Command::Man(man) = cli.command {
        return man.run(Cli::command());
    }
    let context = Context::new(cli.dir, cli.project, cli.quiet);
    // One thread: starting more would cost more than all of a short command.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run(&context, cli.command));
    runtime.shutdown_background();
    result
}

async fn run(context: &Context, command: Command) -> Result<()> {
    match command {
        Command::Launch(command) => command.run(context, true).await,
        Command::Create(command) => command.run(context, false).await,
        Command::List(command) => command.run(context).await,
        Command::Top(command) => command.run(context).await,
        Command::Info(command) => command.run(context).await,
        Command::Exec(command) => command.run(context).await,
        Command::Shell(command) => command.run(context).await,
        Command::Console(command) => command.run(context).await,
        Command::Log(command) => command.run(context).await,
        Command::Start(command) => command.run(context).await,
        Command::Debug(command) => command.run(context).await,
        Command::Reset(command) => command.run(context).await,
        Command::Disk(command) => command.run(context).await,
        Command::Screenshot(command) => command.run(context).await,
        Command::SendKey(command) => command.run(context).await,
        Command::Display(command) => command.run(context).await,
        Command::Pause(command) => command.run(context, lifecycle::Action::Freeze).await,
        Command::Resume(command) => command.run(context, lifecycle::Action::Unfreeze).await,
        Command::Stop(command) => command.run(context, lifecycle::Action::Stop).await,
        Command::Restart(command) => command.run(context, lifecycle::Action::Restart).await,
        Command::Delete(command) => command.run(context).await,
        Command::Copy(command) => command.run(context).await,
        Command::Move(command) => command.run(context).await,
        Command::Rename(command) => command.run(context).await,
        Command::Rebuild(command) => command.run(context).await,
        Command::Publish(command) => command.run(context).await,
        Command::Export(command) => command.run(context).await,
        Command::Import(command) => command.run(context).await,
        Command::Backup(command) => command.run(context).await,
        Command::Config(command) => command.run(context).await,
        Command::Snapshot(command) => command.run(context).await,
        Command::File(command) => command.run(context).await,
        Command::Image(command) => command.run(context).await,
        Command::Network(command) => command.run(context).await,
        Command::Storage(command) => command.run(context).await,
        Command::Profile(command) => command.run(context).await,
        Command::Project(command) => command.run(context).await,
        Command::Operation(command) => command.run(context).await,
        Command::Monitor(command) => command.run(context).await,
        Command::Warning(command) => command.run(context).await,
        Command::Access(command) => command.run(context).await,
        Command::Admin(command) => command.run(context).await,
        Command::Trust(command) => command.run(context).await,
        Command::Token(command) => command.run(context).await,
        Command::Secret(command) => command.run(context).await,
        Command::Audit(command) => command.run(context).await,
        Command::Host(command) => command.run(context).await,
        Command::Query(command) => command.run(context).await,
        Command::Version => version::run(context).await,
        Command::Completion(_) | Command::Man(_) => Ok(()),
    }
}

/// Help goes to stdout and is no error; a wrong command line is one line on stderr.
fn usage(error: &clap::Error) -> Result<()> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            crate::output::print(&error.render().to_string())
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            use std::io::Write as _;
            let _ = write!(std::io::stderr(), "{}", error.render());
            Err(Error::Exit(2))
        }
        _ => Err(Error::Usage(usage_line(&error.render().to_string()))),
    }
}

/// clap's paragraphs in one line: the error, its tips, and where help is.
fn usage_line(text: &str) -> String {
    let mut message = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        let line = line.trim_start_matches("error: ");
        if !message.is_empty() {
            message.push_str(if message.ends_with(':') { " " } else { "; " });
        }
        message.push_str(line);
    }
    let usage = text.lines().find_map(|line| line.trim().strip_prefix("Usage: "));
    let command: Vec<&str> = usage
        .unwrap_or("karst")
        .split_whitespace()
        .take_while(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-'))
        .collect();
    format!("{message} ({} --help shows how)", command.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(arguments: &[&str]) -> String {
        let error = Cli::try_parse_from(arguments).unwrap_err();
        usage(&error).unwrap_err().line().unwrap()
    }

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_reference_is_current() {
        let text = man::reference(Cli::command());
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/cli.md");
        if std::env::var_os("KARST_BLESS").is_some() {
            std::fs::write(file, &text).unwrap();
        }
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        assert!(
            kept == text,
            "docs/reference/cli.md is stale: KARST_BLESS=1 cargo test -p karst the_reference"
        );
    }

    /// The simple commands of lines of a shell, each as its words: without comments and redirections, with what runs in `$(…)`
    /// left as it stands; `None` where a quote is not closed.
    fn commands(text: &str) -> Option<Vec<Vec<String>>> {
        /// A word that has ended goes to the command, unless it is where something is redirected to.
        fn end(word: &mut Option<String>, target: &mut bool, words: &mut Vec<String>) {
            if let Some(word) = word.take()
                && !std::mem::take(target)
            {
                words.push(word);
            }
        }
        let (mut all, mut words, mut word) = (vec![], vec![], None::<String>);
        let (mut quote, mut depth, mut target) = (None, 0, false);
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            match (quote, c) {
                (Some(q), c) if c == q => quote = None,
                (Some('"') | None, '\\') if depth == 0 => {
                    word.get_or_insert_default().push(chars.next()?);
                }
                (Some(_), c) => word.get_or_insert_default().push(c),
                (None, c) if depth > 0 => {
                    depth += i32::from(c == '(') - i32::from(c == ')');
                    word.get_or_insert_default().push(c);
                }
                (None, '\'' | '"') => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                (None, '$') if chars.peek() == Some(&'(') => {
                    chars.next();
                    depth = 1;
                    word.get_or_insert_default().push_str("$(");
                }
                (None, '#') if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
                (None, '<' | '>') => {
                    // The number of what is redirected is no word.
                    if word.as_ref().is_some_and(|w| w.bytes().all(|b| b.is_ascii_digit())) {
                        word = None;
                    }
                    end(&mut word, &mut target, &mut words);
                    while chars.next_if(|c| "<>&".contains(*c)).is_some() {}
                    target = true;
                }
                (None, '|' | '&' | ';' | '(' | ')' | '\n') => {
                    end(&mut word, &mut target, &mut words);
                    all.push(std::mem::take(&mut words));
                    target = false;
                }
                (None, c) if c.is_whitespace() => end(&mut word, &mut target, &mut words),
                (None, c) => word.get_or_insert_default().push(c),
            }
        }
        end(&mut word, &mut target, &mut words);
        all.push(words);
        (quote.is_none() && depth == 0).then_some(all)
    }

    #[test]
    fn what_the_documents_show_is_understood() {
        let shown =
            commands("A=1 karst list -f csv 2>&1 | grep 'a b' >x && karst get \"$(cat x)\" # karst x");
        let words: Vec<String> =
            shown.unwrap().iter().map(|w| w.join("·")).filter(|w| !w.is_empty()).collect();
        assert_eq!(words, ["A=1·karst·list·-f·csv", "grep·a b", "karst·get·$(cat x)"]);
        assert_eq!(commands("echo 'open"), None);

        let top = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let mut files = vec![format!("{top}/README.md"), format!("{top}/docs/tutorial.md")];
        for entry in std::fs::read_dir(format!("{top}/docs/how-to")).unwrap() {
            files.push(entry.unwrap().path().to_str().unwrap().to_owned());
        }
        let not_the_program = |word: &str| {
            let name = word.split_once('=').map(|(name, _)| name);
            let assigns = name.is_some_and(|n| n.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
            assigns || ["do", "then", "else", "!", "if", "while", "sudo", "{"].contains(&word)
        };
        let mut count = 0;
        for file in files {
            let (mut inside, mut line) = (false, String::new());
            for part in std::fs::read_to_string(&file).unwrap().lines().map(str::trim) {
                if part.starts_with("```") {
                    assert!(line.is_empty(), "{file}: {line}: does not end");
                    inside = part == "```sh";
                    continue;
                }
                if !inside {
                    continue;
                }
                if let Some(begin) = part.strip_suffix('\\') {
                    line.push_str(begin);
                    continue;
                }
                line.push_str(part);
                let Some(found) = commands(&line) else {
                    line.push('\n');
                    continue;
                };
                line.clear();
                for words in found {
                    let words: Vec<String> = words.into_iter().skip_while(|w| not_the_program(w)).collect();
                    if words.first().is_some_and(|w| w == "karst") {
                        count += 1;
                        let parsed = Cli::try_parse_from(&words);
                        assert!(parsed.is_ok(), "{file}: {}: {}", words.join(" "), parsed.unwrap_err());
                    }
                }
            }
        }
        assert!(count > 200, "{count} commands were found");
    }

    #[test]
    fn each_command_has_a_manual_page() {
        let directory = tempfile::tempdir().unwrap();
        let man = Cli::try_parse_from(["karst", "man", directory.path().to_str().unwrap()]).unwrap();
        let Command::Man(man) = man.command else { panic!("another command") };
        man.run(Cli::command()).unwrap();
        let mut all = vec![];
        let mut command = Cli::command();
        command.build();
        pages(&command, "karst", &mut all);
        for deep in ["karst", "karst-launch", "karst-network-acl-rule-add"] {
            assert!(all.iter().any(|(name, _)| name == deep), "{deep}");
        }
        for (name, about) in &all {
            let page = directory.path().join(format!("{name}.1"));
            let text = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
            assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{name}: {text}");
            // Its first words, before anything that is written in another way there.
            let words: String = about.chars().take_while(|c| c.is_ascii_alphabetic() || *c == ' ').collect();
            assert!(!words.trim().is_empty() && text.contains(words.trim()), "{name}: {about:?}\n{text}");
        }
        let there = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(there, all.len(), "a page for each command, and no other");
    }

    /// Names of pages and what the commands say of themselves.
    fn pages(command: &clap::Command, name: &str, all: &mut Vec<(String, String)>) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        all.push((name.to_owned(), about));
        for child in command.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set()) {
            pages(child, &format!("{name}-{}", child.get_name()), all);
        }
    }

    #[test]
    fn usage_errors_are_one_line() {
        insta::assert_snapshot!(line(&["karst", "list", "--frmat", "json"]));
        insta::assert_snapshot!(line(&["karst", "lst"]));
        insta::assert_snapshot!(line(&["karst", "file", "push"]));
        insta::assert_snapshot!(line(&["karst", "list", "--format", "xml"]));
        insta::assert_snapshot!(line(&["karst", "stop", "--timeout", "soon", "c1"]));
    }
}
