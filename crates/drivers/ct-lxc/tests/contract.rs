//! The contract of guest drivers, with real containers.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_guest::contract::{Subject, run};
use std::{sync::Arc, time::Duration};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_keep_the_contract() {
    let Some(place) = common::Place::new() else { return };
    let options = place.options();
    run(Subject {
        guest: place.guest(1),
        driver: Box::new(move || Arc::new(karst_ct_lxc::LxcDriver::new(options.clone()).unwrap())),
        boot: Duration::from_secs(180),
        streams: true,
    })
    .await;
    place.assert_clean();
}
