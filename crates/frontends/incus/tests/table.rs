//! The table of paths itself: whole, documented, and with a test for each row that is served.

use karst_frontend_incus::{extensions, routes};

#[test]
fn the_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/incus-api-table.md");
    let now = routes::document();
    if std::env::var_os("KARST_BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == now, "docs/incus-api-table.md is stale: run this test with KARST_BLESS=1");
}

/// Every path and method of Incus' API stands in the table, and every test that the table names exists.
#[test]
fn the_table_is_whole() {
    let table: Vec<(String, String)> = routes::TABLE
        .iter()
        .map(|r| {
            (
                r.method.to_string(),
                r.path
                    .split('/')
                    .map(|s| if s.starts_with('{') { "{}" } else { s })
                    .collect::<Vec<_>>()
                    .join("/"),
            )
        })
        .collect();
    let mut unique = table.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), table.len(), "a row stands twice");
    let api = include_str!("incus-api.txt");
    assert!(api.lines().count() > 200);
    for line in api.lines() {
        let (method, path) = line.split_once(' ').unwrap();
        assert!(table.contains(&(method.to_owned(), path.to_owned())), "{line} is missing in the table");
    }
    let tests = [
        include_str!("api.rs"),
        include_str!("backups.rs"),
        include_str!("history.rs"),
        include_str!("images.rs"),
        include_str!("layers.rs"),
        include_str!("metadata.rs"),
        include_str!("networks.rs"),
        include_str!("oci.rs"),
        include_str!("pending.rs"),
        include_str!("pools.rs"),
        include_str!("clients.rs"),
        include_str!("reasons.rs"),
        include_str!("recover.rs"),
        include_str!("remote.rs"),
        include_str!("secrets.rs"),
        include_str!("settings.rs"),
        include_str!("spice.rs"),
        include_str!("vmids.rs"),
        include_str!("volumes.rs"),
    ]
    .concat();
    let named = routes::TABLE
        .iter()
        .filter_map(|r| match r.state {
            routes::State::Done(_, test) => Some(test),
            routes::State::Open(_) => None,
        })
        .chain(extensions::TESTED.iter().map(|(_, test)| *test));
    for test in named {
        let head = format!("async fn {test}(");
        let mut found = tests.match_indices(&head);
        let (at, _) = found.next().unwrap_or_else(|| panic!("the test {test} does not exist"));
        assert!(found.next().is_none(), "two tests are named {test}");
        assert!(tests[..at].trim_end().ends_with(']'), "{test} is not marked as a test");
        // The server that it starts demands of it to have touched the rows that name it.
        let body = tests[at..].split("\n}\n").next().unwrap_or_default();
        let starts = ["Server::start()", "listening()"].iter().any(|s| body.contains(s));
        assert!(starts, "{test} starts no server, so that nothing says what it touches");
    }
}
