// Loads Compose files as `docker compose up` does (variables and .env, merging, the schema, paths,
// consistency) and prints the project as JSON; a file that it refuses ends it with 1.
//
// compose-go has a command of its own, whose version 2.16 forgets the environment.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(files []string) error {
	folder, err := os.Getwd()
	if err != nil {
		return err
	}
	options, err := cli.NewProjectOptions(
		files, cli.WithWorkingDirectory(folder), cli.WithOsEnv, cli.WithDotEnv,
	)
	if err != nil {
		return err
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		return err
	}
	model, err := project.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = fmt.Println(string(model))
	return err
}
